"""What the official `openai` and `anthropic` packages see of the bridge: one scenario, told as JSON on stdout.

    python3 -m venv DIR && DIR/bin/pip install openai anthropic
    DIR/bin/python tests/sdk_client.py anthropic-chat http://localhost:3456 cab-...

It runs in that venv, apart from the tests; test_sdks.py starts it and judges what it tells. The packages build their objects from
whatever comes. Here every answer, event and chunk must fit its type by pydantic's strict rules; else the program ends with a traceback.
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
TURNS = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five"))
ANSWER = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"], "additionalProperties": False}
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
           "additionalProperties": False}
WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"], "additionalProperties": False}
TOOLS = {"add": ("Adds two numbers.", NUMBERS), "look_up": ("Looks a word up.", WORD)}
RESULTS = {"add": "5", "look_up": "no such word"}
STOP = "<END>"
IMAGE_URL = "https://pictures.example/lighthouse.png"
MOST = 200                                              # models, where a list has no end


def png() -> bytes:
    """A picture of one red pixel."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b""))


def pdf() -> bytes:
    """A document of one empty page."""
    parts = (b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>")
    data, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(data))
        data += b"%d 0 obj%sendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + b"xref\n0 4\n0000000000 65535 f \n%strailer<</Size 4/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (table, len(data))


PNG, PDF = (base64.b64encode(data).decode() for data in (png(), pdf()))


def events(text: str) -> List[Tuple[str, str]]:
    """(name, data) of each event that came over the wire; comments, pings and the last word of a stream are left out."""
    found = []
    for part in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in part.split("\n"))
        if "data" in fields and fields.get("event") != "ping" and fields["data"] != "[DONE]":
            found.append((fields.get("event", ""), fields["data"]))
    return found


class Sdk:
    """One package, and two clients of it. looked_at: the wire is checked before the package has it; strict: checks by itself, and live."""

    def __init__(self, name: str, kind: str, url: str, token: str) -> None:
        self.sdk: Any = importlib.import_module(name)
        self.pydantic: Any = importlib.import_module("pydantic")
        self.Answer: Any = self.pydantic.create_model("Answer", answer=(str, ...))
        self.options: Dict[str, Any] = {"base_url": url, "api_key": token, "max_retries": 0, "timeout": 60.0}
        self.kind, self.asynchronous_kind = getattr(self.sdk, kind), getattr(self.sdk, "Async" + kind)
        hooks = {"response": [self.look]}
        self.looked_at = self.kind(**self.options, http_client=self.sdk.DefaultHttpxClient(event_hooks=hooks))
        self.strict = self.kind(**self.options, _strict_response_validation=True)
        self.types: Dict[str, Any] = {}                  # of a path: the type of its answer; of a path and "events": that of an event
        self.seen = ""                                   # the last answer that was looked at

    def look(self, response: Any) -> None:
        """Reads an answer to its end; what it says on the wire must fit, before the package makes an int of "1"."""
        self.seen = response.read().decode()
        path = re.sub("(?<=/models/).+", "ID", response.url.path)
        if response.status_code == 200 and "event-stream" not in response.headers["content-type"]:
            self.fits(self.seen, self.types[path])
        elif response.status_code == 200:
            for name, data in events(self.seen):
                if "error" not in json.loads(data):
                    told = self.fits(data, self.types[path + " events"])
                    assert name == told.get("type", ""), (name, data)

    def fits(self, body_field: str, kind: Any) -> Any:
        """-> the JSON, after it has passed."""
        self.pydantic.TypeAdapter(kind).validate_json(body_field, strict=True)
        return json.loads(body_field)

    def with_path(self, got: Any, kind: Any) -> Any:
        """An object that the package has made, perhaps of several events. -> as JSON"""
        return self.fits(got.to_json(indent=None, warnings=False), kind)

    def refused(self, call: Callable[[], Any]) -> Dict[str, Any]:
        """The error that a call must end with."""
        try:
            call()
        except self.sdk.APIError as error:
            return {"class": type(error).__name__, "status": getattr(error, "status_code", None), "message": error.message,
                    "body": error.body, "requestId": getattr(error, "request_id", None)}
        raise AssertionError("nothing was refused")

    def models(self) -> Any:
        listed = [json.loads(model.to_json()) for model in itertools.islice(self.looked_at.models.list(), MOST)]
        return {"page": json.loads(self.seen), "listed": listed,
                "strict": [model.id for model in itertools.islice(self.strict.models.list(), MOST)],
                "each": [json.loads(self.looked_at.models.retrieve(model["id"]).to_json()) for model in listed],
                "first": self.strict.models.retrieve(listed[0]["id"]).id,
                "nosuch": self.refused(lambda: self.strict.models.retrieve("nosuch"))}

    def asynchronous(self) -> Any:
        return asyncio.run(self.at_once())

    async def at_once(self) -> Any:
        raise NotImplementedError

    def tools(self) -> Any:
        def ask(**fields: Any) -> Any:
            answer = self.ask(self.looked_at, **fields)
            return answer, self.told(answer)

        return self.round_trip(ask)

    def tools_stream(self) -> Any:
        """Also one whose calls never get a result."""
        return {"low": self.low(content="go on", tools=self.tools_told), **self.round_trip(self.high)}

    def forced_tool(self) -> Any:
        return [self.told(self.ask(self.looked_at, content="forty-two", **self.forced_tool)), self.high(content="forty-two", **self.forced_tool)[1]]


class OverAnthropic(Sdk):
    """The scenarios by the package `anthropic`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__("anthropic", "Anthropic", url, token)
        types = self.sdk.types
        self.Message, self.Event = types.Message, types.RawMessageStreamEvent
        self.types = {"/v1/messages": self.Message, "/v1/messages events": self.Event, "/v1/models/ID": types.ModelInfo,
                      "/v1/models": importlib.import_module("anthropic.pagination").SyncPage[types.ModelInfo]}
        self.tools_told = [{"name": name, "description": told, "input_schema": schema} for name, (told, schema) in TOOLS.items()]
        self.answer_format = {"output_config": {"format": {"type": "json_schema", "schema": ANSWER}}}
        self.forced_tool = {"tools": [{"name": "give", "description": "Gives the answer.", "input_schema": ANSWER}],
                       "tool_choice": {"type": "tool", "name": "give"}}

    def fields(self, content: Any = "hello", **fields: Any) -> Dict[str, Any]:
        """One request. content: of a single turn, unless there are `messages`."""
        return {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": content}], **fields}

    def ask(self, client: Any, **fields: Any) -> Any:
        return client.messages.create(**self.fields(**fields))

    def told(self, message: Any, request: Any = None) -> Dict[str, Any]:
        """A whole message; request: its id, where it came in a stream."""
        body_field = self.with_path(message, self.Message)
        return {"wire": body_field, "text": "".join(block["text"] for block in body_field["content"] if block["type"] == "text"),
                "calls": [(block["name"], block["input"]) for block in body_field["content"] if block["type"] == "tool_use"],
                "ids": [block["id"] for block in body_field["content"] if block["type"] == "tool_use"],
                "stop": body_field["stop_reason"], "requestId": request or message._request_id}

    def low(self, **fields: Any) -> Dict[str, Any]:
        """A stream, event by event."""
        with self.looked_at.messages.create(stream=True, **self.fields(**fields)) as stream:
            got, body_field = [self.with_path(event, self.Event) for event in stream], [json.loads(data) for _, data in events(self.seen)]
            assert [event["type"] for event in got] == [event["type"] for event in body_field]
            return self.streamed(body_field, stream)

    def streamed(self, body_field: List[Any], stream: Any) -> Dict[str, Any]:
        deltas = [event["delta"] for event in body_field if event["type"] == "content_block_delta"]
        return {"events": body_field, "text": "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta"),
                "requestId": stream.response.headers.get("request-id"), "type": stream.response.headers.get("content-type")}

    def high(self, **fields: Any) -> Any:
        """A stream by the package's helper. -> (the message in the end, what is told of it)"""
        with self.strict.messages.stream(**self.fields(**fields)) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
            return message, {"kinds": kinds, **self.told(message, stream.request_id)}

    def chat(self) -> Any:
        return [self.told(self.ask(client, system=SYSTEM)) for client in (self.looked_at, self.strict)]

    def conversation(self) -> Any:
        turns = [{"role": role, "content": [{"type": "text", "text": text}] if text == "three" else text} for role, text in TURNS]
        system = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
        return self.told(self.ask(self.strict, system=system, messages=turns))

    def stream(self) -> Any:
        return {"low": self.low(system=SYSTEM), "high": self.high(system=SYSTEM)[1]}

    def image(self) -> Any:
        return self.told(self.ask(self.strict, content=[
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
            {"type": "image", "source": {"type": "url", "url": IMAGE_URL}},
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
            {"type": "text", "text": "what is this?"}]))

    def schema(self) -> Any:
        whole = self.told(self.ask(self.looked_at, content="forty-two", **self.answer_format))
        streamed = self.low(content="forty-two", **self.answer_format)
        parsed = self.strict.messages.parse(output_format=self.Answer, **self.fields("forty-two"))
        told = self.told(parsed, "-")
        return {"texts": [whole["text"], streamed["text"], told["text"]], "parsed": [parsed.parsed_output.answer],
                "stops": [whole["stop"], told["stop"]]}

    def round_trip(self, ask: Callable[..., Any]) -> Any:
        """Both tools are called at once, and both results sent in one message. ask(...) -> (a message, what is told of it)"""
        turns: List[Any] = [{"role": "user", "content": "go on"}]
        called, told = ask(messages=turns, tools=self.tools_told)
        results: Dict[str, Dict[str, Any]] = {
            "add": {"content": RESULTS["add"]}, "look_up": {"content": [{"type": "text", "text": RESULTS["look_up"]}], "is_error": True}}
        turns += [{"role": "assistant", "content": called.content},
                  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, **results[block.name]}
                                               for block in called.content if block.type == "tool_use"]}]
        return {"called": told, "ended": ask(messages=turns, tools=self.tools_told)[1]}

    def errors(self) -> Any:
        stranger = self.kind(**{**self.options, "api_key": "cab-nobody"})
        return {"token": self.refused(lambda: self.ask(stranger)), "request": self.refused(lambda: self.ask(self.looked_at, messages=[])),
                "model": self.refused(lambda: self.ask(self.looked_at, model="nosuch")),
                "stream": self.refused(lambda: self.low(model="nosuch")),
                "path": self.refused(lambda: self.looked_at.get("/v1/nosuch", cast_to=object))}

    def models(self) -> Any:
        """Also page by page: a server may take `limit` or not, the whole is the same."""
        told = super().models()
        return {**told, "paged": [model.id for model in itertools.islice(self.strict.models.list(limit=1), MOST)]}

    async def at_once(self) -> Any:
        async with self.asynchronous_kind(**self.options, _strict_response_validation=True) as client:
            async def streamed() -> Any:
                stream = await client.messages.create(stream=True, **self.fields("streamed"))
                return self.streamed([self.with_path(event, self.Event) async for event in stream], stream)

            whole, stream = await asyncio.gather(client.messages.create(**self.fields("whole")), streamed())
            return {"whole": self.told(whole), "stream": stream, "models": [model.id async for model in client.models.list()]}

    def stop(self) -> Any:
        stop_sequences = {"stop_sequences": ["<OTHER>", STOP]}
        return {"whole": self.told(self.ask(self.looked_at, **stop_sequences)), "low": self.low(**stop_sequences), "high": self.high(**stop_sequences)[1]}


class OverOpenAI(Sdk):
    """The scenarios by the package `openai`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__("openai", "OpenAI", url + "/v1", token)
        types, chat = importlib.import_module("openai.types"), importlib.import_module("openai.types.chat")
        self.Completion, self.Chunk = chat.ChatCompletion, chat.ChatCompletionChunk
        self.types = {"/v1/chat/completions": self.Completion, "/v1/chat/completions events": self.Chunk, "/v1/models/ID": types.Model,
                      "/v1/models": importlib.import_module("openai.pagination").SyncPage[types.Model]}
        self.tools_told = [{"type": "function", "function": {"name": name, "description": told, "parameters": schema, "strict": True}}
                           for name, (told, schema) in TOOLS.items()]
        give = {"name": "give", "description": "Gives the answer.", "parameters": ANSWER}
        self.forced_tool = {"tools": [{"type": "function", "function": give}], "tool_choice": {"type": "function", "function": {"name": "give"}}}

    def fields(self, content: Any = "hello", system: str = "", **fields: Any) -> Dict[str, Any]:
        """One request. content: of a single turn, unless there are `messages`."""
        instructions = [{"role": "system", "content": system}] if system else []
        return {"model": MODEL, "messages": [*instructions, {"role": "user", "content": content}], **fields}

    def ask(self, client: Any, **fields: Any) -> Any:
        return client.chat.completions.create(**self.fields(**fields))

    def told(self, completion: Any, request: Any = None) -> Dict[str, Any]:
        """A whole completion; request: its id, where it came in a stream."""
        body_field = self.with_path(completion, self.Completion)
        choice, = body_field["choices"]
        calls = choice["message"].get("tool_calls") or []
        return {"wire": body_field, "text": choice["message"]["content"], "ids": [call["id"] for call in calls],
                "calls": [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls],
                "stop": choice["finish_reason"], "requestId": request or completion._request_id}

    def low(self, **fields: Any) -> Dict[str, Any]:
        """A stream, chunk by chunk."""
        with self.looked_at.chat.completions.create(stream=True, **self.fields(**fields)) as stream:
            count, body_field = sum(1 for _ in stream), [json.loads(data) for _, data in events(self.seen)]
            assert count == len(body_field) and self.seen.rstrip().endswith("data: [DONE]")
            return self.streamed(body_field, stream)

    def streamed(self, body_field: List[Any], stream: Any) -> Dict[str, Any]:
        deltas = [choice["delta"] for chunk in body_field for choice in chunk["choices"]]
        return {"events": body_field, "text": "".join(delta.get("content") or "" for delta in deltas),
                "requestId": stream.response.headers.get("x-request-id"), "type": stream.response.headers.get("content-type")}

    def high(self, **fields: Any) -> Any:
        """A stream by the package's helper. -> (the completion in the end, what is told of it)"""
        with self.strict.chat.completions.stream(stream_options={"include_usage": True}, **self.fields(**fields)) as stream:
            kinds = [event.type for event in stream]
            completion = stream.get_final_completion()
            return completion, {"kinds": kinds, **self.told(completion, "-")}

    def chat(self) -> Any:
        return [self.told(self.ask(client, system=SYSTEM)) for client in (self.looked_at, self.strict)]

    def conversation(self) -> Any:
        turns = [{"role": role, "content": [{"type": "text", "text": text}] if text == "three" else text} for role, text in TURNS]
        return self.told(self.ask(self.strict, messages=[{"role": "developer", "content": SYSTEM}, *turns]))

    def stream(self) -> Any:
        return {"low": self.low(system=SYSTEM), "high": self.high(system=SYSTEM)[1],
                "counted": self.low(system=SYSTEM, stream_options={"include_usage": True})}

    def image(self) -> Any:
        return self.told(self.ask(self.strict, content=[
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG, "detail": "low"}},
            {"type": "image_url", "image_url": {"url": IMAGE_URL}},
            {"type": "file", "file": {"filename": "empty.pdf", "file_data": "data:application/pdf;base64," + PDF}},
            {"type": "text", "text": "what is this?"}]))

    def schema(self) -> Any:
        named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
        whole = self.told(self.ask(self.looked_at, content="forty-two", response_format=named))
        streamed = self.low(content="forty-two", response_format=named)
        parsed = self.strict.chat.completions.parse(response_format=self.Answer, **self.fields("forty-two"))
        told = self.told(parsed)
        final, final_told = self.high(content="forty-two", response_format=self.Answer)
        some = self.told(self.ask(self.looked_at, content="forty-two", system="Answer in JSON.", response_format={"type": "json_object"}))
        return {"texts": [each["text"] for each in (whole, streamed, told, final_told, some)],
                "parsed": [each.choices[0].message.parsed.answer for each in (parsed, final)],
                "stops": [each["stop"] for each in (whole, told, final_told, some)]}

    def round_trip(self, ask: Callable[..., Any]) -> Any:
        """Both tools are called at once, and both results sent as a message each. ask(...) -> (a completion, what is told of it)"""
        turns: List[Any] = [{"role": "user", "content": "go on"}]
        called, told = ask(messages=turns, tools=self.tools_told)
        message = called.choices[0].message
        turns += [message, *({"role": "tool", "tool_call_id": call.id, "content": RESULTS[call.function.name]}
                             for call in message.tool_calls or [])]
        return {"called": told, "ended": ask(messages=turns, tools=self.tools_told)[1]}

    def errors(self) -> Any:
        stranger = self.kind(**{**self.options, "api_key": "cab-nobody"})
        return {"token": self.refused(lambda: self.ask(stranger)), "request": self.refused(lambda: self.ask(self.looked_at, messages=[])),
                "model": self.refused(lambda: self.ask(self.looked_at, model="nosuch")),
                "stream": self.refused(lambda: self.low(model="nosuch")),
                "path": self.refused(lambda: self.looked_at.get("/nosuch", cast_to=object)),
                "two": self.refused(lambda: self.ask(self.looked_at, n=2))}

    async def at_once(self) -> Any:
        async with self.asynchronous_kind(**self.options, _strict_response_validation=True) as client:
            async def streamed() -> Any:
                stream = await client.chat.completions.create(stream=True, **self.fields("streamed"))
                return self.streamed([self.with_path(chunk, self.Chunk) async for chunk in stream], stream)

            whole, stream = await asyncio.gather(client.chat.completions.create(**self.fields("whole")), streamed())
            return {"whole": self.told(whole), "stream": stream, "models": [model.id async for model in client.models.list()]}

    def stop(self) -> Any:
        return {"whole": self.told(self.ask(self.looked_at, stop=STOP)), "low": self.low(stop=["<OTHER>", STOP]),
                "high": self.high(stop=[STOP])[1]}


def main(scenario: str, url: str, token: str) -> None:
    """scenario: the package, and a method of its class, as in anthropic-tools_stream."""
    package, _, name = scenario.partition("-")
    sdk = {"anthropic": OverAnthropic, "openai": OverOpenAI}[package](url, token)
    print(json.dumps(getattr(sdk, name)()))


if __name__ == "__main__":
    main(*sys.argv[1:])
