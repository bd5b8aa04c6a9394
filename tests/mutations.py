"""Malformed requests, generated from an OpenAPI document, and a strict check of the responses.

`Mutations` generates the requests: well-formed HTTP with wrong content, and mutated bytes.
`Judge` finds the faults of a response.
tests/test_fuzz.py uses both for a short run, tests/bench/fuzz.py for a long one.
"""

from __future__ import annotations

import copy
import json
import random
import re
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import (
    Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple,
)
from urllib.parse import quote, unquote

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# A header that a response has only if a request could inject it.
CANARY = "x-injected"
# The longest `wait` of a request, in seconds.
LONGEST_WAIT = 2

# Values of a field in a JSON body.
ODD: Sequence[Any] = (
    # Constants and numbers.
    None, True, False,
    0, 1, -1, 1.5, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30,
    float("nan"), float("inf"),
    # Strings: blank, not printable, not Unicode, long.
    "", " ", "\n", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "\U0001f600",
    "e\u0301" * 50, "x" * 200, "x" * 40_000, "\U0001f600" * 9_000,
    # Strings that mean something elsewhere.
    "0", "1e3", "null", "/etc/passwd", "../../..", "@/etc/passwd", "/help", "!ls",
    "'; DROP TABLE jobs;--", "%s%n%00", "a\r\nX-Injected: 1", "<script>", "{", "default", "auto",
    # Lists and objects.
    [], {}, [[]], [{}], [None], ["x"] * 300,
    {"": None}, {"type": []}, {"type": "text"}, {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    {"__proto__": {"admin": True}},
)
# Parts of a path.
PARTS = (
    "..", ".", "%2e%2e", "%00", "a%00b", "%", "%zz", "%f", "%ff", "%c0%af", "%ed%a0%80",
    "%F0%9F%98%80", "%2F", "%2f..%2f", "%25", "%0d%0aX-Injected:%201",
    "*", "-1", "0", "1", "null", "undefined", "'", "%27%20OR%201=1", "x" * 300, "x" * 9_000,
    "default", ";", "a;b", "a:b", "~", "$", "%20", "%09", "{id}", "\\", "events", "events/events",
)
# Values in a query string.
VALUES = (
    # Numbers.
    "", "0", "1", "-1", "00", "1.5", "1e3", "NaN", "inf", "true", "%D9%A3", "%C2%B2", "%00", "%ff",
    "%0d%0aX-Injected:%201",
    "9" * 9, "9" * 18, "9" * 19, "9223372036854775807", "9223372036854775808", "9" * 30,
    "9" * 5_000, "0x10", "1_0", "+1", "%201", "1%20", "a" * 2_000,
    # Statuses and lists.
    "queued", "queued,error", "queued,queued,x", ",", ",,,",
    "null", "[]", "%", "100", "400", "401", "[1]", "../..",
)
HEADERS: Sequence[Tuple[str, Sequence[str]]] = (
    ("Idempotency-Key", ("k", "k2", "", "x" * 200, "x" * 201, "\xff\xfe", "a, b", "'\"", "\t")),
    ("Last-Event-ID", ("0", "-1", "5", "x", "9" * 30, "", "1.5", "\xb2", "9" * 5_000)),
    ("Accept", ("text/html", "*/*", "text/event-stream", "", ",;q=,", "text/html;q=0")),
    (
        "Content-Type",
        (
            "text/plain",
            "application/json; charset=utf-16",
            "",
            "multipart/form-data; boundary=x",
            "application/x-www-form-urlencoded",
        ),
    ),
    ("Content-Encoding", ("gzip", "identity", "br", "")),
    ("Expect", ("100-continue", "200-ok", "", "100-CONTINUE")),
    ("anthropic-version", ("2023-06-01", "")),
    ("anthropic-beta", ("x",)),
    ("x-api-key", ("cab-", "sk-ant-x", "", "\xff")),
    ("Connection", ("close", "keep-alive", "upgrade", "close, keep-alive", "")),
    ("Upgrade", ("websocket", "h2c")),
    (
        "CF-Connecting-IP",
        ("1.2.3.4", "::1", "x", "[::1]", "fe80::1%eth0", "::ffff:1.2.3.4", "1.2.3.4, 5.6.7.8"),
    ),
    ("X-Forwarded-For", ("1.2.3.4",)),
    ("X-HTTP-Method-Override", ("DELETE",)),
    ("Range", ("bytes=0-1", "x")),
    ("Origin", ("null", "https://example.com")),
    ("Cookie", ("a=b; " * 20,)),
    ("If-None-Match", ("*",)),
    ("Access-Control-Request-Method", ("DELETE",)),
    ("Referer", ("x",)),
    ("X-Long", ("x" * 4_000, "x" * 20_000)),
)
HOSTS = (
    "localhost", "127.0.0.1", "[::1]", "127.0.0.1:99999", "example.com", "", "[::1%25eth0]", "[",
    "a..b", "localhost:", "LOCALHOST.", "x" * 300, "1", "0x7f.1",
)
METHODS = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT",
    "get", "PROPFIND", "X" * 32, "X" * 33,
)
# Whole bodies.
BODIES = (
    # JSON that is not an object, and text that is not JSON.
    b"", b"null", b"[]", b"7", b'"x"', b"{", b"}", b"{}{}", b"{} x", b"\xef\xbb\xbf{}",
    b"{'a': 1}", b'{"a": 1,}', b"// x\n{}", b"\xff\xfe{\x00}\x00", b"\x00",
    # Bytes that are not UTF-8, and numbers out of range.
    b'{"message": "\xff"}', b'{"message": "\xed\xa0\x80"}', b'{"message": 1' + b"0" * 5_000 + b"}",
    b'{"message": 1e999}',
    # Deep nesting, above and below the limit of 100.
    b"[" * 50_000, b'{"a":' * 20_000, b"[" * 101 + b"]" * 101, b"[" * 99 + b"]" * 99,
    b'{"message": "x", "message": 7}', b'{"message": NaN}', b'"\\ud800"', b"a=b&c=d",
    # A long name, many names, and a long text.
    b'{"' + b"k" * 100_000 + b'": 1}',
    b"{" + b",".join(b'"f%d": 1' % n for n in range(5_000)) + b"}",
    b"x" * 70_000,
)
# Bytes that are inserted into a request.
SPLITS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b" ", b"\t", b"\r\n ", b":",
    b"\r\nX-Injected: 1\r\n", b"\r\nHost: example.com\r\n", b"0\r\n\r\n",
    b"\r\nContent-Length: 5\r\n", b"\r\nTransfer-Encoding: chunked\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1", b"\xff", b"\xc2\x85",
    b"ffffffff\r\n", b"-1\r\n", b"0x5\r\n", b";" * 40, b" HTTP/0.9\r\n",
    # The start of a TLS handshake, and of HTTP/2.
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\nContent-Length: 99999999999999999999\r\n", b"\r\nExpect: 100-continue\r\n",
    b"\r\nConnection: close\r\n", b"%", b"x" * 17_000,
)
# Fields that make a request of the native API, or of /v1, invalid.
INVALID_ASK: Sequence[Tuple[str, Any]] = (
    ("message", 7),
    ("message", None),
    ("message", " "),
    ("message", "x" * 32_769),
    ("model", "a b"),
    ("model", []),
    ("wait", -1),
    ("wait", "x"),
    ("effort", "none "),
    ("stream", "yes"),
    ("jsonSchema", "x"),
    ("systemPrompt", "x" * 32_769),
)
UNKNOWN_RESULT = {"type": "tool_result", "tool_use_id": "nobody", "content": []}
INVALID_CHAT: Sequence[Tuple[str, Any]] = (
    ("messages", None),
    ("messages", []),
    ("messages", {}),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "assistant", "content": "a"}]),
    ("model", "a b"),
    ("tools", {"a": 1}),
    ("tools", [{"type": "web_search"}]),
    ("stream", "yes"),
    ("messages", [{"role": "user", "content": [{"type": "video"}]}]),
    ("tool_choice", 7),
    ("messages", [{"role": "user", "content": [UNKNOWN_RESULT]}]),
)
# The last message of a conversation. `call` makes the fake call the client's tools.
PROMPTS = (
    "hi",
    "say a",
    'call [["look", {"q": "x"}]]',
    'call [["look", {}], ["look", {"q": "y"}]]',
    "big 40",
    "\U0001f600" * 40,
    "/help",
)


def nested(levels: int) -> Any:
    """Return a value of so many levels, alternately lists and objects."""
    value: Any = 1
    for n in range(levels):
        value = [value] if n % 2 else {"a": value}
    return value


@dataclass
class Request:
    """A well-formed HTTP request.

    role: of its token.  chunks: sizes of the pieces of a chunked body, or none for a body with a
    length.  value: the body before it became bytes.
    """

    method: str
    target: str
    headers: List[Tuple[str, str]]
    body: bytes
    role: str
    chunks: Sequence[int] = ()
    value: Any = None
    version: str = "1.1"

    @property
    def data(self) -> bytes:
        """The bytes of the request."""
        headers = list(self.headers)
        body = self.body
        if self.chunks:
            headers.append(("Transfer-Encoding", "chunked"))
            body = self._chunked_body()
        elif body or self.method in ("POST", "PUT", "PATCH"):
            headers.append(("Content-Length", str(len(body))))
        first = "%s %s HTTP/%s\r\n" % (self.method, self.target, self.version)
        lines = "".join("%s: %s\r\n" % header for header in headers)
        return (first + lines + "\r\n").encode("latin-1") + body

    def _chunked_body(self) -> bytes:
        data, position = b"", 0
        for size in [*self.chunks, len(self.body)]:
            piece = self.body[position : position + size]
            position += size
            if piece:
                data += b"%x\r\n%b\r\n" % (len(piece), piece)
        return data + b"0\r\n\r\n"


@dataclass
class Memory:
    """Ids from earlier responses, which later requests use.

    tokens: (id, secret); the tokens that all requests need are never in it.
    calls: (path, body of the request, body of the response) of the latest tool calls.
    """

    jobs: Deque[str] = field(default_factory=lambda: deque(maxlen=40))
    tokens: Deque[Tuple[str, str]] = field(default_factory=lambda: deque(maxlen=40))
    calls: Deque[Tuple[str, Any, Any]] = field(default_factory=lambda: deque(maxlen=4))


class Mutations:
    """Generates requests.

    spec: the OpenAPI document.  tokens: role -> secret.
    runs: the share of the valid requests among those that would start `claude`.
    The same seed and the same learned responses give the same requests.
    """

    def __init__(
        self, spec: Mapping[str, Any], tokens: Mapping[str, str], seed: int, runs: float = 0.05
    ) -> None:
        self._spec = spec
        self._tokens = tokens
        self._runs = runs
        self.random = random.Random(seed)
        self.memory = Memory()
        self._routes = [
            (path, method.upper(), operation)
            for path, methods in spec["paths"].items()
            for method, operation in methods.items()
            # Otherwise later requests would wait.
            if path != "/api/queue/pause"
        ]
        self._weights = [
            6 if "requestBody" in operation else 2 for _, _, operation in self._routes
        ]

    def happens(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random.random() < probability

    def odd_value(self) -> Any:
        """Return a value that a field hardly expects."""
        if self.happens(0.03):
            return nested(self.random.choice((30, 98, 101, 150)))
        return copy.deepcopy(self.random.choice(ODD))

    # --- well-formed requests ---

    def request(self) -> Request:
        """Return a request with any number of faults, or none."""
        path, method, operation = self.random.choices(self._routes, self._weights)[0]
        roles = ("admin", "ordinary", "stateful", "none", "wrong", "made")
        role = self.random.choices(roles, (8, 5, 5, 1, 1, 2))[0]
        if self._needs_admin(operation) and self.happens(0.7):
            role = "admin"
        headers = [("Host", "127.0.0.1"), *self._token_header(role)]
        if self.happens(0.05):
            headers[0] = ("Host", self.random.choice(HOSTS))
        value, body = None, b""
        if "requestBody" in operation or self.happens(0.03):
            value = self._body_value(path, operation)
            body = self._as_bytes(value)
            headers.append(("Content-Type", "application/json"))
        while self.happens(0.2):
            name, values = self.random.choice(HEADERS)
            position = self.random.randrange(len(headers) + 1)
            headers.insert(position, (name, self.random.choice(values)))
        if self.happens(0.04):
            method = self.random.choice(METHODS)
        elif method == "GET" and self.happens(0.06):
            method = "HEAD"
        chunks: Sequence[int] = ()
        if body and self.happens(0.1):
            count = self.random.randrange(1, 5)
            chunks = [self.random.choice((1, 2, 7, 100, 5_000)) for _ in range(count)]
        target = self._target(path, operation)
        version = "1.0" if self.happens(0.02) else "1.1"
        return Request(method, target, headers, body, role, chunks, value, version)

    @staticmethod
    def _needs_admin(operation: Mapping[str, Any]) -> bool:
        return "admin_required" in operation["responses"].get("403", {}).get("description", "")

    def _token_header(self, role: str) -> List[Tuple[str, str]]:
        """Return the header with a token, or no header."""
        secret = self._tokens.get(role)
        if role == "made" and self.memory.tokens:
            secret = self.random.choice(list(self.memory.tokens))[1]
        if role == "wrong":
            secret = self.random.choice(("cab-" + "0" * 64, "x", "cab-", "\xff" * 9, "x" * 3_000))
        if secret is None:
            return []
        forms = (
            ("Authorization", "Bearer " + secret),
            ("x-api-key", secret),
            ("authorization", "bearer  " + secret),
        )
        return [self.random.choice(forms)]

    def _target(self, path: str, operation: Mapping[str, Any]) -> str:
        """Return a request target: the path with its parameters, and a query."""

        def parameter(_: "re.Match[str]") -> str:
            valid: Sequence[str] = list(self.memory.jobs)
            if "ask" not in path:
                valid = [token_id for token_id, _ in self.memory.tokens]
            if "models" in path:
                valid = ("sonnet", "haiku", "default")
            if "conversations" in path:
                valid = ("default", "trip-to-rome", "a")
            if not self.happens(0.95):
                return str(uuid.UUID(int=self.random.getrandbits(128)))
            return self.random.choice(valid if valid and self.happens(0.7) else PARTS)

        target = re.sub(r"\{\w+\}", parameter, path)
        if self.happens(0.06):
            target = self.random.choice(self._spellings(target))
        names = [row["name"] for row in operation["parameters"] if row["in"] == "query"]
        query = []
        while self.happens(0.5 if names else 0.1):
            query.append(self._query_field(names))
        if self.happens(0.01):
            query += ["a=1"] * 2_000
        if not query:
            return target
        return target + "?" + self.random.choice("&&&;").join(query)

    def _spellings(self, target: str) -> Sequence[str]:
        """Return other spellings of a path; some still name the same resource."""
        return (
            target + "/",
            target + "//",
            "/" + target,
            target.upper(),
            target.replace("/", "//"),
            target + "/..",
            "/." + target,
            "http://127.0.0.1" + target,
            "https://x" + target,
            quote(target, safe=""),
            target.replace("a", "%61"),
            target + "%2f",
            target + "#x",
            target[1:],
            "*",
            target.replace("/", "%2F"),
            target + "/" + self.random.choice(PARTS),
        )

    def _query_field(self, names: Sequence[str]) -> str:
        """Return `name=value` or something similar. names: the documented ones."""
        if names and self.happens(0.9):
            name = self.random.choice(names)
        else:
            name = self.random.choice(("x", "", "wait", "%00", "token", "a[]"))
        value = self.random.choice(VALUES)
        sign = self.random.choice(("=", "=", "=", "==", ""))
        is_number = re.fullmatch(r"[0-9]{1,2}(\.\d*)?", value)
        if name == "wait" and is_number and float(value) > LONGEST_WAIT:
            value = "1"
        return name + sign + value

    def _body_value(self, path: str, operation: Mapping[str, Any]) -> Any:
        """Return the value of a body: a valid one, mutated any number of times."""
        if "requestBody" not in operation:
            return {"message": "x"}
        is_chat = path.startswith("/v1")
        value = self._chat(path) if is_chat else self._example(operation)
        while self.happens(0.6):
            value = self._mutated(value)
        if not isinstance(value, dict):
            return value
        calls_are_valid = value.get("tool_choice", {"type": "auto"}) in ("auto", {"type": "auto"})
        if "tools" not in value or not calls_are_valid:
            # The fake would call tools that the request does not offer.
            value = json.loads(json.dumps(value).replace("call [[", "say [["))
        wait = value.get("wait")
        if isinstance(wait, (int, float)) and LONGEST_WAIT < wait <= 90:
            value["wait"] = 1
        if (is_chat or path == "/api/ask") and not self.happens(self._runs):
            value = self._invalidated(value)
        return value

    def _example(self, operation: Mapping[str, Any]) -> Any:
        """Return a body with the required fields, and some others, of the document's examples."""
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        if "$ref" in schema:
            schema = self._spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return {
            name: copy.deepcopy(row["examples"][0])
            for name, row in schema["properties"].items()
            if name in schema["required"] or self.happens(0.4)
        }

    def _chat(self, path: str) -> Any:
        """Return a conversation in the format of the path.

        Sometimes it continues an earlier one with the results of its tool calls.
        """
        is_messages = path == "/v1/messages"
        earlier = [call for call in self.memory.calls if call[0] == path]
        if earlier and self.happens(0.3):
            return self._with_results(*copy.deepcopy(self.random.choice(earlier)))
        text = self.random.choice(PROMPTS)
        picture, past, options = messages_parts() if is_messages else completions_parts()
        messages: List[Any] = past if self.happens(0.4) else []
        content: Any = text
        if self.happens(0.3):
            content = [picture, {"type": "text", "text": text}]
        messages = [*messages, {"role": "user", "content": content}]
        body: Dict[str, Any] = {"model": "haiku", "max_tokens": 9, "messages": messages}
        for name, value in options.items():
            if self.happens(0.7 if name == "tools" else 0.3):
                body[name] = copy.deepcopy(value)
        return body

    @staticmethod
    def _with_results(path: str, body: Any, response: Any) -> Any:
        """Return the body of a request, continued by its response and results of the calls."""
        messages = body["messages"]
        if path == "/v1/messages":
            messages.append({"role": "assistant", "content": response["content"]})
            results = [
                {"type": "tool_result", "tool_use_id": block["id"], "content": "r"}
                for block in response["content"]
                if block["type"] == "tool_use"
            ]
            messages.append({"role": "user", "content": results})
        else:
            message = response["choices"][0]["message"]
            messages.append(message)
            for call in message["tool_calls"]:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "r"})
        return body

    def _mutated(self, value: Any) -> Any:
        """Return the value after one change of a value inside it.

        The change drops, renames, replaces, repeats, wraps or moves it.
        """
        paths = list(paths_in(value))[1:]
        if not paths or self.happens(0.02):
            return self.odd_value()
        *path, last = self.random.choice(paths)
        parent = value_at(value, path)
        action = self.random.randrange(7)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            item = parent.pop(last)
            names = (
                last.upper(), last + " ", last + "\x00", "\ud800" + last, "", last[:-1],
                "unknown" * 20,
            )
            parent[self.random.choice(names)] = item
        elif action == 2:
            parent[last] = copy.deepcopy(value_at(value, self.random.choice(paths)))
        elif action == 3 and isinstance(parent, list):
            parent.extend(copy.deepcopy([parent[last]]) * self.random.choice((1, 2, 300)))
        elif action == 4:
            parent[last] = [parent[last]] if self.happens(0.5) else {"a": parent[last]}
        elif action == 5 and isinstance(parent[last], str):
            suffixes = ("\x00", "\ud800", " ", "x" * 33_000, "\r\n")
            parent[last] += self.random.choice(suffixes)
        elif action == 5 and isinstance(parent[last], (int, float)):
            parent[last] = str(parent[last])
        elif action == 6 and isinstance(value, dict) and self.happens(0.1):
            return {name: None for name in value}
        else:
            parent[last] = self.odd_value()
        return value

    def _invalidated(self, value: Dict[str, Any]) -> Dict[str, Any]:
        """Return the body with a field that the bridge refuses."""
        is_chat = "messages" in value or "max_tokens" in value
        name, item = self.random.choice(INVALID_CHAT if is_chat else INVALID_ASK)
        return {**value, name: item}

    def _as_bytes(self, value: Any) -> bytes:
        """Return a body: the value as JSON, sometimes malformed."""
        if self.happens(0.05):
            return self.random.choice(BODIES)
        data = json.dumps(value, ensure_ascii=self.happens(0.5)).encode("utf-8", "surrogatepass")
        action = self.random.randrange(40)
        if action == 0 and data.endswith(b"}") and len(data) > 2:
            # Every name is duplicated.
            data = data[:-1] + b", " + data[1:-1] + b"}"
        elif action == 1:
            data = b"\xef\xbb\xbf" + data
        elif action == 2:
            data = json.dumps(value).encode("utf-16")
        elif action == 3:
            data = data.replace(b":", self.random.choice((b"=", b"::", b": -", b":\x00")), 1)
        elif action == 4:
            data += self.random.choice((b" " * 3_000, b"\n{}", b"\x00", b"]"))
        elif action == 5 and data:
            data = data[: self.random.randrange(len(data))]
        return data

    # --- bytes ---

    def raw(self) -> bytes:
        """Return the bytes of a request or two, mutated several times."""
        data = self.request().data
        if self.happens(0.25):
            other = self.request().data
            if self.happens(0.5):
                data += other
            else:
                data = data[: self._position(data)] + other[self._position(other) :]
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 8))):
            data = self._mutated_bytes(data)
        # A long `wait` would delay the response.
        return re.sub(rb"(wait\"?[=:] ?)[1-9][0-9]+", rb"\g<1>1", data)

    def _mutated_bytes(self, data: bytes) -> bytes:
        """Return the bytes after one change: flipped, cut, doubled, inserted or replaced."""
        at = self._position(data)
        action = self.random.randrange(9)
        if action <= 1 and at < len(data):
            flipped = data[at] ^ (1 << self.random.randrange(8))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        if action == 2:
            return data[:at]
        if action == 3:
            return data[:at] + data[at + self.random.choice((1, 2, 10, 100)) :]
        if action == 4:
            end = at + self.random.choice((1, 2, 20, 200))
            return data[:end] + data[at:end] * self.random.choice((1, 1, 2, 50)) + data[end:]
        if action == 5:
            return data[:at] + self.random.choice(SPLITS) + data[at:]
        if action == 6:
            return self._mutated_line(data)
        if action == 7:
            return self._mutated_number(data, at)
        newline = self.random.choice((b"\n", b"\r", b"\r\r\n", b"\r\n\t"))
        return data.replace(b"\r\n", newline, self.random.choice((1, -1)))

    def _mutated_line(self, data: bytes) -> bytes:
        """Return the bytes with one line dropped, doubled or changed."""
        lines = data.split(b"\r\n")
        n = self.random.randrange(len(lines))
        line = lines[n]
        lines[n : n + 1] = self.random.choice(
            (
                [],
                [line] * 2,
                [line.lower()],
                [b" " + line],
                [line.replace(b":", b" :", 1)],
                [line + b"\r"],
            )
        )
        return b"\r\n".join(lines)

    def _mutated_number(self, data: bytes, at: int) -> bytes:
        """Return the bytes with a number replaced, preferably one at the end of a line."""
        match = re.search(rb"\d+(?=\r\n)", data[at:]) or re.search(rb"\d+", data)
        if not match or re.search(rb"[?&]wait=$|\"wait\": ?$", data[: match.start()]):
            return data
        numbers = (
            b"0", b"-1", b"+5", b"99", b"1048577", b"9" * 16, b"0x1", b"", b"1,1", b" 7",
        )
        return data.replace(match.group(), self.random.choice(numbers), 1)

    def _position(self, data: bytes) -> int:
        """Return a random position in the bytes, preferably in the head."""
        head = data.find(b"\r\n\r\n") + 4
        return self.random.randrange(head if head > 4 and self.happens(0.7) else len(data) + 1)

    # --- responses ---

    def learn(self, request: Request, response: "Response") -> None:
        """Remember the ids in a response."""
        body = response.json() if response.status in (200, 201, 202) else None
        if not isinstance(body, dict):
            return
        if isinstance(body.get("requestId"), str):
            self.memory.jobs.append(body["requestId"])
        if response.status == 201 and "tokenId" in body:
            self.memory.tokens.append((body["tokenId"], body["token"]))
        path = request.target.partition("?")[0]
        reason = None
        if path == "/v1/messages":
            reason = body.get("stop_reason")
        elif path == "/v1/chat/completions":
            reason = body.get("choices", [{}])[0].get("finish_reason")
        if reason in ("tool_use", "tool_calls"):
            self.memory.calls.append((path, request.value, body))


SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}


def messages_parts() -> Tuple[Any, List[Any], Dict[str, Any]]:
    """Return (a picture, earlier messages, optional fields) of the Messages API."""
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    picture = {"type": "image", "source": source}
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "r"}, picture],
    }
    past = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": "b"},
    ]
    answer_format = {"type": "json_schema", "schema": SCHEMA}
    options = {
        "tools": [{"name": "look", "description": "d", "input_schema": SCHEMA}],
        "system": "s",
        "stream": True,
        "stop_sequences": ["b"],
        "tool_choice": {"type": "auto"},
        "temperature": 1,
        "output_config": {"effort": "low", "format": answer_format},
        "metadata": {"user_id": "u"},
    }
    return picture, past, options


def completions_parts() -> Tuple[Any, List[Any], Dict[str, Any]]:
    """Return (a picture, earlier messages, optional fields) of the Chat Completions API."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}
    call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    past = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    function = {"name": "look", "description": "d", "parameters": SCHEMA}
    answer_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    options = {
        "tools": [{"type": "function", "function": function}],
        "stream": True,
        "stop": ["b"],
        "tool_choice": "auto",
        "n": 1,
        "reasoning_effort": "low",
        "stream_options": {"include_usage": True},
        "response_format": answer_format,
    }
    return picture, past, options


def paths_in(value: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """Yield the paths of all values inside, down to a dozen levels; first the value's own."""
    yield path
    if len(path) >= 12:
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:20])
    for key, item in items:
        yield from paths_in(item, (*path, key))


def value_at(value: Any, path: Sequence[Any]) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


# --- responses ---


class Violation(Exception):
    """A fault of a response."""


@dataclass
class Response:
    """A response. The names in `headers` are in lower case."""

    status: int
    headers: Dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the value of a JSON body, or None for another type. Raises Violation."""
        if not self.headers.get("content-type", "").startswith("application/json") or not self.body:
            return None
        try:
            return json.loads(self.body.decode("utf-8"), parse_constant=refuse_constant)
        except ValueError as error:
            raise Violation("the body is not JSON: %s" % error) from None


def refuse_constant(word: str) -> None:
    """Raise ValueError for NaN and Infinity, which are not JSON."""
    raise ValueError(word)


STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]+")
FIELD_LINE = re.compile(
    rb"([A-Za-z0-9-]+): ([\x21-\x7e](?:[\x20-\x7e\xa0-\xff]*[\x21-\x7e\xa0-\xff])?)"
)
# Headers that must not be repeated.
ONCE = (
    "content-length", "transfer-encoding", "content-type", "connection", "date", "location",
    "retry-after",
)


def read_response(data: bytes, is_head: bool, is_ended: bool) -> Optional[Tuple[Response, int]]:
    """Return the first response in the bytes, and where it ends; None if it is incomplete.

    is_head: it answers a HEAD request.  is_ended: no more bytes will arrive.  Raises Violation.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        is_start = b"HTTP/1.1 "[: len(data)] == data[:9]
        if is_ended or len(data) > 65_536 or not is_start:
            raise Violation("no response head: %r" % data[:200])
        return None
    code, headers = read_head(data[:end])
    at = end + 4
    if code < 200:
        return Response(code, headers, b""), at
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Violation("two lengths")
    if is_head or code == 204:
        return Response(code, headers, b""), at
    if "transfer-encoding" in headers:
        chunked = read_chunks(data, at)
        if chunked:
            return Response(code, headers, chunked[0]), chunked[1]
    elif "content-length" in headers:
        size = int(headers["content-length"])
        if len(data) >= at + size:
            return Response(code, headers, data[at : at + size]), at + size
    elif headers.get("connection") != "close":
        raise Violation("no length, but the connection stays open")
    elif is_ended:
        return Response(code, headers, data[at:]), len(data)
    if is_ended:
        raise Violation("the response is cut off: %r" % data[-200:])
    return None


def read_head(data: bytes) -> Tuple[int, Dict[str, str]]:
    """Return (status, headers) of a response head. Raises Violation."""
    first, *lines = data.split(b"\r\n")
    status = STATUS_LINE.fullmatch(first)
    if not status:
        raise Violation("no status line: %r" % first[:200])
    headers: Dict[str, str] = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Violation("not a header: %r" % line[:200])
        name = match.group(1).decode().lower()
        if name == CANARY or (name in headers and name in ONCE):
            raise Violation("unexpected header %s" % name)
        headers[name] = match.group(2).decode("latin-1")
    return int(status.group(1)), headers


def read_chunks(data: bytes, at: int) -> Optional[Tuple[bytes, int]]:
    """Return a chunked body from `at`, and where it ends; None if it is incomplete."""
    parts = []
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        if not re.fullmatch(rb"[0-9a-f]{1,8}", data[at:end]):
            raise Violation("not a chunk: %r" % data[at : at + 60])
        size, at = int(data[at:end], 16), end + 2
        if len(data) < at + size + 2:
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise Violation("no end of a chunk: %r" % data[at + size : at + size + 60])
        parts.append(data[at : at + size])
        at += size + 2
        if not size:
            return b"".join(parts), at


class Judge:
    """Compares responses with the OpenAPI document. secret: no response may contain it."""

    def __init__(self, spec: Mapping[str, Any], secret: str = "") -> None:
        self._schemas = spec["components"]["schemas"]
        self._secret = secret.encode()
        self._paths = [
            (re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)), re.IGNORECASE), methods)
            for path, methods in spec["paths"].items()
        ]
        self._codes: Dict[int, Set[str]] = {}
        for _, methods in self._paths:
            for operation in methods.values():
                for status, row in operation["responses"].items():
                    examples = row["content"].get("application/json", {}).get("examples", {})
                    self._codes.setdefault(int(status), set()).update(examples)
        # The bridge may send these before it knows the route.
        self.general = {400, 401, 404, 405, 417, 421, 429, 431, 501, 503, 505}

    def check(self, request: Request, response: Response) -> None:
        """Check the response to a well-formed request. Raises Violation."""
        if self._secret and self._secret in response.body:
            raise Violation("the response contains the admin token")
        operation = self._operation(request)
        if request.method == "OPTIONS" and response.status == 204:
            return
        documented = operation["responses"].get(str(response.status)) if operation else None
        if documented is None and (operation or response.status not in self.general):
            raise Violation("the status %d is not documented here" % response.status)
        if response.status == 500 and not is_failed_run(response):
            raise Violation("500")
        if request.method == "HEAD":
            return
        if response.status >= 400:
            return self.check_error(response)
        kind = response.headers.get("content-type", "").partition(";")[0]
        kinds = documented["content"] if documented else {}
        if kind not in kinds:
            raise Violation("the type %s is not documented here" % kind)
        if kind == "application/json":
            mismatch = self._mismatch(response.json(), kinds[kind]["schema"], "body")
            if mismatch:
                raise Violation(mismatch)
        elif kind == "text/event-stream":
            check_events(response.body)

    def check_raw(self, response: Response) -> None:
        """Check the response to arbitrary bytes. Raises Violation."""
        is_internal = response.status == 500 and not is_failed_run(response)
        if is_internal or response.status not in (100, 204, *self._codes):
            raise Violation("the status %d" % response.status)
        if response.status >= 400 and response.body:
            self.check_error(response)
        response.json()

    def check_error(self, response: Response) -> None:
        """Check that a body has the form of one of the three kinds of errors."""
        body = response.json()
        native, messages, completions = (
            self._mismatch(body, {"$ref": "#/components/schemas/" + name}, "body")
            for name in ("Error", "MessageError", "CompletionError")
        )
        if native and messages and completions:
            text = response.body[:300].decode("utf-8", "replace")
            raise Violation("not a documented error: %s" % text)
        if native is None and body["code"] not in self._codes[response.status]:
            details = (body["code"], response.status)
            raise Violation("the code %s is not documented for %d" % details)

    def _operation(self, request: Request) -> Optional[Mapping[str, Any]]:
        """Return the operation that the request means, or None."""
        path = request.target.partition("?")[0]
        if not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        if re.search("[^/]/$", path):
            path = path[:-1]
        method = "get" if request.method == "HEAD" else request.method.lower()
        # An escaped slash is not a separator.
        parts = [unquote(part).replace("/", "\0").replace("\n", "\0") for part in path.split("/")]
        flat = "/".join(parts)
        for pattern, methods in self._paths:
            if method in methods and pattern.fullmatch(flat):
                operation: Mapping[str, Any] = methods[method]
                return operation
        return None

    def _mismatch(self, value: Any, schema: Mapping[str, Any], path: str) -> Optional[str]:
        """Return the first difference between a value and its schema, or None."""
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(KINDS[kind](value) for kind in kinds):
            return "%s is %.80r, not %s" % (path, value, " or ".join(kinds))
        if isinstance(value, dict):
            return self._object_mismatch(value, schema, path)
        if isinstance(value, list) and "items" in schema:
            for n, item in enumerate(value):
                mismatch = self._mismatch(item, schema["items"], "%s.%d" % (path, n))
                if mismatch:
                    return mismatch
        return None

    def _object_mismatch(
        self, value: Mapping[str, Any], schema: Mapping[str, Any], path: str
    ) -> Optional[str]:
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return "%s lacks %s" % (path, ", ".join(missing))
        properties = schema.get("properties", {})
        extra = [name for name in value if properties and name not in properties]
        if extra:
            return "%s has %s, which is not documented" % (path, ", ".join(extra))
        for name, part_schema in properties.items():
            if name in value:
                mismatch = self._mismatch(value[name], part_schema, path + "." + name)
                if mismatch:
                    return mismatch
        return None


def is_failed_run(response: Response) -> bool:
    """Return whether a 500 reports a failure of `claude`, not of the bridge."""
    if response.headers.get("x-should-retry") != "false":
        return False
    return b"Internal server error" not in response.body


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "null": lambda value: value is None,
}


def check_events(body: bytes) -> None:
    """Check the form of a stream of events. Raises Violation."""
    if body and not body.endswith(b"\n\n"):
        raise Violation("the last event is cut off: %r" % body[-100:])
    for line in body.split(b"\n"):
        match = re.fullmatch(rb"(|: ?.*|id: \d+|event: [a-z_]+|data: (.*))", line)
        if not match:
            raise Violation("not a line of an event: %r" % line[:100])
        if match.group(2) not in (None, b"[DONE]"):
            try:
                json.loads(match.group(2).decode("utf-8"), parse_constant=refuse_constant)
            except ValueError as error:
                raise Violation("an event is not JSON: %s" % error) from None


def read_all(data: bytes, is_head: Optional[bool]) -> List[Response]:
    """Return all responses of a connection that has ended. Raises Violation for other bytes.

    is_head: whether they answer HEAD requests; None: some of them may.
    """
    responses: List[Response] = []
    at = 0
    while at < len(data):
        try:
            parsed = read_response(data[at:], bool(is_head), True)
            rest = data[at + parsed[1] : at + parsed[1] + 9] if parsed else b""
            if rest and rest != b"HTTP/1.1 ":
                raise Violation("extra bytes after a response: %r" % rest)
        except Violation:
            if is_head is not None:
                raise
            parsed = read_response(data[at:], True, True)
        assert parsed
        responses.append(parsed[0])
        at += parsed[1]
    return responses
