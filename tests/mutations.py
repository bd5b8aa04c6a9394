"""Requests as nobody should send them, made from an OpenAPI document, and a strict reader of what is answered.

`Mutations` makes them: whole ones with something wrong inside, and bytes that were a request once. `Judge` says what is
wrong with an answer. Both are used by tests/test_fuzz.py, and at length by tests/bench/fuzz.py.
"""
from __future__ import annotations

import copy
import json
import random
import re
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple
from urllib.parse import quote, unquote

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CANARY = "x-injected"                                   # a header that only we would want in an answer
HELD = 2                                                # the longest `wait` that is asked for, in seconds

ODD: Sequence[Any] = (
    None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, 5e-324, 2 ** 31, 2 ** 53 + 1, 2 ** 63, -2 ** 63 - 1, 10 ** 30, float("nan"),
    float("inf"),
    "", " ", "\n", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "\U0001f600", "e\u0301" * 50, "x" * 200, "x" * 40_000,
    "\U0001f600" * 9_000, "0", "1e3", "null", "/etc/passwd", "../../..", "@/etc/passwd", "/help", "!ls", "'; DROP TABLE jobs;--", "%s%n%00",
    "a\r\nX-Injected: 1", "<script>", "{", "default", "auto", [], {}, [[]], [{}], [None], ["x"] * 300, {"": None}, {"type": []},
    {"type": "text"}, {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, {"__proto__": {"admin": True}})
PARTS = ("..", ".", "%2e%2e", "%00", "a%00b", "%", "%zz", "%f", "%ff", "%c0%af", "%ed%a0%80", "%F0%9F%98%80", "%2F", "%2f..%2f", "%25",
    "%0d%0aX-Injected:%201",
         "*", "-1", "0", "1", "null", "undefined", "'", "%27%20OR%201=1", "x" * 300, "x" * 9_000, "default", ";", "a;b", "a:b", "~", "$",
         "%20", "%09",
         "{id}", "\\", "events", "events/events")
VALUES = ("", "0", "1", "-1", "00", "1.5", "1e3", "NaN", "inf", "true", "%D9%A3", "%C2%B2", "%00", "%ff", "%0d%0aX-Injected:%201", "9" * 9,
    "9" * 18, "9" * 19,
          "9223372036854775807", "9223372036854775808", "9" * 30, "9" * 5_000, "0x10", "1_0", "+1", "%201", "1%20", "a" * 2_000, "queued",
          "queued,error",
          "queued,queued,x", ",", ",,,", "null", "[]", "%", "100", "400", "401", "[1]", "../..")
HEADERS: Sequence[Tuple[str, Sequence[str]]] = (
    ("Idempotency-Key", ("k", "k2", "", "x" * 200, "x" * 201, "\xff\xfe", "a, b", "'\"", "\t")),
    ("Last-Event-ID", ("0", "-1", "5", "x", "9" * 30, "", "1.5", "\xb2", "9" * 5_000)),
    ("Accept", ("text/html", "*/*", "text/event-stream", "", ",;q=,", "text/html;q=0")),
    ("Content-Type", ("text/plain", "application/json; charset=utf-16", "", "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded")),
    ("Content-Encoding", ("gzip", "identity", "br", "")), ("Expect", ("100-continue", "200-ok", "", "100-CONTINUE")),
    ("anthropic-version", ("2023-06-01", "")), ("anthropic-beta", ("x",)), ("x-api-key", ("cab-", "sk-ant-x", "", "\xff")),
    ("Connection", ("close", "keep-alive", "upgrade", "close, keep-alive", "")), ("Upgrade", ("websocket", "h2c")),
    ("CF-Connecting-IP", ("1.2.3.4", "::1", "x", "[::1]", "fe80::1%eth0", "::ffff:1.2.3.4", "1.2.3.4, 5.6.7.8")),
    ("X-Forwarded-For", ("1.2.3.4",)),
    ("X-HTTP-Method-Override", ("DELETE",)), ("Range", ("bytes=0-1", "x")), ("Origin", ("null", "https://example.com")),
    ("Cookie", ("a=b; " * 20,)),
    ("If-None-Match", ("*",)), ("Access-Control-Request-Method", ("DELETE",)), ("Referer", ("x",)), ("X-Long", ("x" * 4_000, "x" * 20_000)))
HOSTS = ("localhost", "127.0.0.1", "[::1]", "127.0.0.1:99999", "example.com", "", "[::1%25eth0]", "[", "a..b", "localhost:", "LOCALHOST.",
    "x" * 300, "1", "0x7f.1")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND", "X" * 32, "X" * 33)
BODIES = (b"", b"null", b"[]", b"7", b'"x"', b"{", b"}", b"{}{}", b"{} x", b"\xef\xbb\xbf{}", b"{'a': 1}", b'{"a": 1,}', b"// x\n{}",
    b"\xff\xfe{\x00}\x00", b"\x00",
          b'{"message": "\xff"}', b'{"message": "\xed\xa0\x80"}', b'{"message": 1' + b"0" * 5_000 + b"}", b'{"message": 1e999}',
          b"[" * 50_000,
          b'{"a":' * 20_000, b"[" * 101 + b"]" * 101, b"[" * 99 + b"]" * 99, b'{"message": "x", "message": 7}', b'{"message": NaN}',
          b'"\\ud800"', b"a=b&c=d",
          b'{"' + b"k" * 100_000 + b'": 1}', b"{" + b",".join(b'"f%d": 1' % n for n in range(5_000)) + b"}", b"x" * 70_000)
SPLITS = (b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b" ", b"\t", b"\r\n ", b":", b"\r\nX-Injected: 1\r\n", b"\r\nHost: example.com\r\n",
    b"0\r\n\r\n", b"\r\nContent-Length: 5\r\n",
          b"\r\nTransfer-Encoding: chunked\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1", b"\xff", b"\xc2\x85",
          b"ffffffff\r\n", b"-1\r\n", b"0x5\r\n", b";" * 40,
          b" HTTP/0.9\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
          b"\r\nContent-Length: 99999999999999999999\r\n",
          b"\r\nExpect: 100-continue\r\n", b"\r\nConnection: close\r\n", b"%", b"x" * 17_000)


def nested(levels: int) -> Any:
    value: Any = 1
    for n in range(levels):
        value = [value] if n % 2 else {"a": value}
    return value


@dataclass
class Sent:
    """A request that is whole as HTTP. head: what the server reads it as; who: whose token it carries."""
    method: str
    target: str
    headers: List[Tuple[str, str]]
    body: bytes
    who: str
    chunks: Sequence[int] = ()                          # sizes of the pieces of a chunked body; none: one length
    told: Any = None                                    # the body as it was before it became bytes
    version: str = "1.1"

    @property
    def data(self) -> bytes:
        headers = list(self.headers)
        body = self.body
        if self.chunks:
            headers.append(("Transfer-Encoding", "chunked"))
            body, at = b"", 0
            for size in [*self.chunks, len(self.body)]:
                piece = self.body[at:at + size]
                at += size
                body += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            body += b"0\r\n\r\n"
        elif body or self.method in ("POST", "PUT", "PATCH"):
            headers.append(("Content-Length", str(len(body))))
        lines = "".join("%s: %s\r\n" % header for header in headers)
        return ("%s %s HTTP/%s\r\n%s\r\n" % (self.method, self.target, self.version, lines)).encode("latin-1") + body


@dataclass
class Seen:
    """What earlier answers told: what the next requests may name. The ids of the tokens that all requests need are never here."""
    jobs: Deque[str] = field(default_factory=lambda: deque(maxlen=40))
    tokens: Deque[Tuple[str, str]] = field(default_factory=lambda: deque(maxlen=40))        # (id, secret)
    calls: Deque[Tuple[str, Any, Any]] = field(default_factory=lambda: deque(maxlen=4))     # (path, body, answer)


class Mutations:
    """spec: the OpenAPI document; tokens: by who holds them; runs: of what would start `claude`, the part that may.

    The same seed makes the same requests for as long as the same answers are learned.
    """

    def __init__(self, spec: Mapping[str, Any], tokens: Mapping[str, str], seed: int, runs: float = 0.05) -> None:
        self._spec, self._tokens, self._runs, self.chance, self.seen = spec, tokens, runs, random.Random(seed), Seen()
        self._routes = [(path, method.upper(), told) for path, methods in spec["paths"].items() for method, told in methods.items()]
        self._weights = [6 if "requestBody" in told else 2 for _, _, told in self._routes]

    def is_so(self, part: float) -> bool:
        return self.chance.random() < part

    def odd(self) -> Any:
        return nested(self.chance.choice((30, 98, 101, 150))) if self.is_so(0.03) else copy.deepcopy(self.chance.choice(ODD))

    # --- whole requests ---

    def request(self) -> Sent:
        """A request with nothing to several things wrong."""
        path, method, told = self.chance.choices(self._routes, self._weights)[0]
        who = self.chance.choices(("admin", "ordinary", "stateful", "none", "wrong", "made"), (8, 5, 5, 1, 1, 2))[0]
        if self._needs_admin(told) and self.is_so(0.7):
            who = "admin"
        headers = [("Host", "127.0.0.1"), *self._token(who)]
        if self.is_so(0.05):
            headers[0] = ("Host", self.chance.choice(HOSTS))
        value, body = None, b""
        if "requestBody" in told or self.is_so(0.03):
            value = self._value(path, told)
            body = self._as_bytes(value)
            headers.append(("Content-Type", "application/json"))
        while self.is_so(0.2):
            name, values = self.chance.choice(HEADERS)
            headers.insert(self.chance.randrange(len(headers) + 1), (name, self.chance.choice(values)))
        if self.is_so(0.04):
            method = self.chance.choice(METHODS)
        elif method == "GET" and self.is_so(0.06):
            method = "HEAD"
        chunks = [self.chance.choice((1, 2, 7, 100, 5_000)) for _ in range(self.chance.randrange(1, 5))] if body and self.is_so(0.1) else ()
        return Sent(method, self._target(path, told), headers, body, who, chunks, value, "1.0" if self.is_so(0.02) else "1.1")

    @staticmethod
    def _needs_admin(told: Mapping[str, Any]) -> bool:
        return "admin_required" in told["responses"].get("403", {}).get("description", "")

    def _token(self, who: str) -> List[Tuple[str, str]]:
        secret = self._tokens.get(who)
        if who == "made" and self.seen.tokens:
            secret = self.chance.choice(list(self.seen.tokens))[1]
        if who == "wrong":
            secret = self.chance.choice(("cab-" + "0" * 64, "x", "cab-", "\xff" * 9, "x" * 3_000))
        if secret is None:
            return []
        return [self.chance.choice((("Authorization", "Bearer " + secret), ("x-api-key", secret), ("authorization", "bearer  " + secret)))]

    def _target(self, path: str, told: Mapping[str, Any]) -> str:
        def part(found: "re.Match[str]") -> str:
            known: Sequence[str] = list(self.seen.jobs) if "ask" in path else [each[0] for each in self.seen.tokens]
            if "models" in path:
                known = ("sonnet", "haiku", "default")
            if "conversations" in path:
                known = ("default", "trip-to-rome", "a")
            return str(self.chance.choice(known if known and self.is_so(0.7) else PARTS) if self.is_so(0.95)
                else uuid.UUID(int=self.chance.getrandbits(128)))

        target = re.sub(r"\{\w+\}", part, path)
        if self.is_so(0.06):
            target = self.chance.choice((target + "/", target + "//", "/" + target, target.upper(), target.replace("/", "//"),
                target + "/..", "/." + target,
                                         "http://127.0.0.1" + target, "https://x" + target, quote(target, safe=""),
                                         target.replace("a", "%61"), target + "%2f",
                                         target + "#x", target[1:], "*", target.replace("/", "%2F"),
                                         target + "/" + self.chance.choice(PARTS)))
        names = [row["name"] for row in told["parameters"] if row["in"] == "query"]
        query = []
        while self.is_so(0.5 if names else 0.1):
            name = self.chance.choice(names) if names and self.is_so(0.9) else self.chance.choice(("x", "", "wait", "%00", "token", "a[]"))
            value = self.chance.choice(VALUES)
            is_long = name == "wait" and re.fullmatch(r"[0-9]{1,2}(\.\d*)?", value) and float(value) > HELD
            query.append(name + self.chance.choice(("=", "=", "=", "==", "")) + ("1" if is_long else value))
        if self.is_so(0.01):
            query += ["a=1"] * 2_000
        return target + ("?" + self.chance.choice("&&&;").join(query) if query else "")

    def _value(self, path: str, told: Mapping[str, Any]) -> Any:
        """What the body says."""
        if "requestBody" not in told:
            return {"message": "x"}
        schema = told["requestBody"]["content"]["application/json"]["schema"]
        if "$ref" in schema:
            schema = self._spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        starts_run = path == "/api/ask" or path.startswith("/v1")
        value = self._chat(path) if path.startswith("/v1") else {
            name: copy.deepcopy(row["examples"][0]) for name, row in schema["properties"].items() if name in schema["required"]
            or self.is_so(0.4)}
        while self.is_so(0.6):
            value = self._changed(value)
        if isinstance(value, dict):
            if "tools" not in value or value.get("tool_choice", {"type": "auto"}) not in ("auto", {"type": "auto"}):
                value = json.loads(json.dumps(value).replace("call [[", "say [["))      # the fake calls what was never offered, too
            if isinstance(value.get("wait"), (int, float)) and HELD < value["wait"] <= 90:
                value["wait"] = 1
            if starts_run and not self.is_so(self._runs):
                value = self._spoiled(value)
        return value

    def _chat(self, path: str) -> Any:
        """A conversation in one of the two formats; sometimes it goes on where an answer called a tool."""
        is_messages, more = path == "/v1/messages", [each for each in self.seen.calls if each[0] == path]
        if more and self.is_so(0.3):
            _, body, answer = copy.deepcopy(self.chance.choice(more))
            body["messages"].append({"role": "assistant", "content": answer["content"]} if is_messages else answer["choices"][0]["message"])
            calls = [each["id"] for each in answer["content"] if each["type"] == "tool_use"] if is_messages else [
                each["id"] for each in answer["choices"][0]["message"]["tool_calls"]]
            results = [{"type": "tool_result", "tool_use_id": each, "content": "r"} for each in calls]
            body["messages"] += [{"role": "user", "content": results}] if is_messages else [
                {"role": "tool", "tool_call_id": each, "content": "r"} for each in calls]
            return body
        schema = {"type": "object", "properties": {"q": {"type": "string"}}}
        text = self.chance.choice(("hi", "say a", 'call [["look", {"q": "x"}]]', 'call [["look", {}], ["look", {"q": "y"}]]', "big 40",
            "\U0001f600" * 40, "/help"))
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}} if is_messages else {
            "type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}
        tools: List[Any] = [{"name": "look", "description": "d", "input_schema": schema}] if is_messages else [
            {"type": "function", "function": {"name": "look", "description": "d", "parameters": schema}}]
        past: List[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "t1",
            "name": "look", "input": {}}]},
                           {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
                           "content": [{"type": "text", "text": "r"}, picture]}]},
                           {"role": "assistant", "content": "b"}] if is_messages else [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "r"}, {"role": "assistant", "content": "b"}]
        body: Dict[str, Any] = {"model": "haiku", "max_tokens": 9, "messages": [
            *(past if self.is_so(0.4) else []), {"role": "user", "content": [picture, {"type": "text", "text": text}] if self.is_so(0.3)
            else text}]}
        more_fields: Mapping[str, Any] = {
            "tools": tools, "system": "s", "stream": True, "stop_sequences": ["b"], "tool_choice": {"type": "auto"}, "temperature": 1,
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": schema}},
            "metadata": {"user_id": "u"}} if is_messages else {
            "tools": tools, "stream": True, "stop": ["b"], "tool_choice": "auto", "n": 1, "reasoning_effort": "low",
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
        body.update((name, copy.deepcopy(each)) for name, each in more_fields.items() if self.is_so(0.7 if name == "tools" else 0.3))
        return body

    def _changed(self, value: Any) -> Any:
        """The value with one thing in it dropped, renamed, replaced, repeated or in another's place."""
        ways = list(places(value))[1:]
        if not ways or self.is_so(0.02):
            return self.odd()
        *way, last = self.chance.choice(ways)
        place = value
        for key in way:
            place = place[key]
        act = self.chance.randrange(7)
        if act == 0:
            del place[last]
        elif act == 1 and isinstance(place, dict):
            place[self.chance.choice((last.upper(), last + " ", last + "\x00", "\ud800" + last, "", last[:-1],
                "unknown" * 20))] = place.pop(last)
        elif act == 2:
            other = value
            for key in self.chance.choice(ways):
                other = other[key]
            place[last] = copy.deepcopy(other)
        elif act == 3 and isinstance(place, list):
            place.extend(copy.deepcopy([place[last]]) * self.chance.choice((1, 2, 300)))
        elif act == 4:
            place[last] = [place[last]] if self.is_so(0.5) else {"a": place[last]}
        elif act == 5 and isinstance(place[last], (int, float, str)):
            place[last] = str(place[last]) if not isinstance(place[last], str) else place[last] + self.chance.choice(("\x00", "\ud800",
                " ", "x" * 33_000, "\r\n"))
        elif act == 6 and isinstance(value, dict) and self.is_so(0.1):
            return {name: None for name in value}
        else:
            place[last] = self.odd()
        return value

    def _spoiled(self, value: Dict[str, Any]) -> Dict[str, Any]:
        """Surely refused."""
        name, odd = self.chance.choice((
            ("message", 7), ("message", None), ("message", " "), ("message", "x" * 32_769), ("model", "a b"), ("model", []), ("wait", -1),
            ("wait", "x"), ("effort", "none "),
            ("stream", "yes"), ("jsonSchema", "x"), ("systemPrompt", "x" * 32_769)) if "messages" not in value
            and "max_tokens" not in value else (
            ("messages", None), ("messages", []), ("messages", {}), ("messages", [{"role": "user"}]),
            ("messages", [{"role": "assistant", "content": "a"}]),
            ("model", "a b"), ("tools", {"a": 1}), ("tools", [{"type": "web_search"}]), ("stream", "yes"),
            ("messages", [{"role": "user", "content": [{"type": "video"}]}]),
            ("tool_choice", 7), ("messages", [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "nobody",
            "content": []}]}])))
        return {**value, name: odd}

    def _as_bytes(self, value: Any) -> bytes:
        if self.is_so(0.05):
            return self.chance.choice(BODIES)
        data = json.dumps(value, ensure_ascii=self.is_so(0.5)).encode("utf-8", "surrogatepass")
        act = self.chance.randrange(40)
        if act == 0 and data.endswith(b"}") and len(data) > 2:      # a name that stands twice
            data = data[:-1] + b", " + data[1:-1] + b"}"
        elif act == 1:
            data = b"\xef\xbb\xbf" + data
        elif act == 2:
            data = json.dumps(value).encode("utf-16")
        elif act == 3:
            data = data.replace(b":", self.chance.choice((b"=", b"::", b": -", b":\x00")), 1)
        elif act == 4:
            data += self.chance.choice((b" " * 3_000, b"\n{}", b"\x00", b"]"))
        elif act == 5 and data:
            data = data[:self.chance.randrange(len(data))]
        return data

    # --- bytes ---

    def raw(self) -> bytes:
        """One or two requests with bytes flipped, cut, doubled, put in, or joined in the middle."""
        data = self.request().data
        if self.is_so(0.25):
            other = self.request().data
            data = data + other if self.is_so(0.5) else data[:self._somewhere(data)] + other[self._somewhere(other):]
        for _ in range(self.chance.choice((1, 1, 1, 2, 2, 3, 8))):
            at = self._somewhere(data)
            act = self.chance.randrange(9)
            if act <= 1 and at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << self.chance.randrange(8))]) + data[at + 1:]
            elif act == 2:
                data = data[:at]
            elif act == 3:
                data = data[:at] + data[at + self.chance.choice((1, 2, 10, 100)):]
            elif act == 4:
                end = at + self.chance.choice((1, 2, 20, 200))
                data = data[:end] + data[at:end] * self.chance.choice((1, 1, 2, 50)) + data[end:]
            elif act == 5:
                data = data[:at] + self.chance.choice(SPLITS) + data[at:]
            elif act == 6:
                lines = data.split(b"\r\n")
                n = self.chance.randrange(len(lines))
                lines[n:n + 1] = self.chance.choice(([], [lines[n]] * 2, [lines[n].lower()], [b" " + lines[n]],
                    [lines[n].replace(b":", b" :", 1)], [lines[n] + b"\r"]))
                data = b"\r\n".join(lines)
            elif act == 7:
                found = re.search(rb"\d+(?=\r\n)", data[at:]) or re.search(rb"\d+", data)
                if found and not re.search(rb"[?&]wait=$|\"wait\": ?$", data[:found.start()]):
                    data = data.replace(found.group(), self.chance.choice((b"0", b"-1", b"+5", b"99", b"1048577", b"9" * 16, b"0x1", b"",
                        b"1,1", b" 7")), 1)
            else:
                data = data.replace(b"\r\n", self.chance.choice((b"\n", b"\r", b"\r\r\n", b"\r\n\t")), self.chance.choice((1, -1)))
        return re.sub(rb"(wait\"?[=:] ?)[1-9][0-9]+", rb"\g<1>1", data)

    def _somewhere(self, data: bytes) -> int:
        """A place in the bytes, mostly in the head."""
        head = data.find(b"\r\n\r\n") + 4
        return self.chance.randrange(head if head > 4 and self.is_so(0.7) else len(data) + 1)

    # --- what was answered ---

    def learn(self, sent: Sent, answer: "Answered") -> None:
        body = answer.json() if answer.status in (200, 201, 202) else None
        if not isinstance(body, dict):
            return
        if isinstance(body.get("requestId"), str):
            self.seen.jobs.append(body["requestId"])
        if answer.status == 201 and "tokenId" in body:
            self.seen.tokens.append((body["tokenId"], body["token"]))
        path = sent.target.partition("?")[0]
        if path == "/v1/messages" and body.get("stop_reason") == "tool_use" or path == "/v1/chat/completions" and body.get("choices",
            [{}])[0].get(
                "finish_reason") == "tool_calls":
            self.seen.calls.append((path, sent.told, body))


def places(value: Any, before: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """The way to every value inside, not deeper than a dozen levels."""
    yield before
    if len(before) < 12:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ():
            yield from places(item, (*before, key))


# --- answers ---


class Wrong(Exception):
    """What is wrong with an answer."""


@dataclass
class Answered:
    status: int
    headers: Dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, if it is said to be JSON."""
        if not self.headers.get("content-type", "").startswith("application/json") or not self.body:
            return None
        try:
            return json.loads(self.body.decode("utf-8"), parse_constant=refused)
        except ValueError as error:
            raise Wrong("the body is no JSON: %s" % error) from None


def refused(word: str) -> None:
    raise ValueError(word)


STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]+")
FIELD_LINE = re.compile(rb"([A-Za-z0-9-]+): ([\x21-\x7e](?:[\x20-\x7e\xa0-\xff]*[\x21-\x7e\xa0-\xff])?)")
ONCE = ("content-length", "transfer-encoding", "content-type", "connection", "date", "location", "retry-after")


def read_answer(data: bytes, is_head: bool, is_ended: bool) -> Optional[Tuple[Answered, int]]:
    """The first answer in the bytes and where it ends; None: it is not whole yet. is_ended: nothing more will come. Raises Wrong."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if is_ended or len(data) > 65_536 or data and not b"HTTP/1.1 "[:len(data)] == data[:9]:
            raise Wrong("no head of an answer: %r" % data[:200])
        return None
    first, *lines = data[:end].split(b"\r\n")
    status = STATUS_LINE.fullmatch(first)
    if not status:
        raise Wrong("no status line: %r" % first[:200])
    headers: Dict[str, str] = {}
    for line in lines:
        found = FIELD_LINE.fullmatch(line)
        if not found:
            raise Wrong("no header: %r" % line[:200])
        name = found.group(1).decode().lower()
        if name in headers and name in ONCE or name == CANARY:
            raise Wrong("the header %s should not be here" % name)
        headers[name] = found.group(2).decode("latin-1")
    code, at = int(status.group(1)), end + 4
    if code < 200:
        return Answered(code, headers, b""), at
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Wrong("two lengths")
    if is_head or code == 204:
        return Answered(code, headers, b""), at
    if "transfer-encoding" in headers:
        whole = read_chunks(data, at)
        if whole:
            return Answered(code, headers, whole[0]), whole[1]
    elif "content-length" in headers:
        size = int(headers["content-length"])
        if len(data) >= at + size:
            return Answered(code, headers, data[at:at + size]), at + size
    elif headers.get("connection") != "close":
        raise Wrong("no length on a connection that is kept")
    elif is_ended:
        return Answered(code, headers, data[at:]), len(data)
    if is_ended:
        raise Wrong("the answer breaks off: %r" % data[-200:])
    return None


def read_chunks(data: bytes, at: int) -> Optional[Tuple[bytes, int]]:
    """A chunked body from `at` on, and where it ends."""
    parts = []
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        if not re.fullmatch(rb"[0-9a-f]{1,8}", data[at:end]):
            raise Wrong("no chunk: %r" % data[at:at + 60])
        size, at = int(data[at:end], 16), end + 2
        if len(data) < at + size + 2:
            return None
        if data[at + size:at + size + 2] != b"\r\n":
            raise Wrong("a chunk does not end: %r" % data[at + size:at + size + 60])
        parts.append(data[at:at + size])
        at += size + 2
        if not size:
            return b"".join(parts), at


class Judge:
    """Compares answers with the OpenAPI document."""

    def __init__(self, spec: Mapping[str, Any], secret: str = "") -> None:
        """secret: what must be in no answer."""
        self._schemas, self._secret = spec["components"]["schemas"], secret.encode()
        self._paths = [(re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)), re.IGNORECASE), methods) for path,
            methods in spec["paths"].items()]
        self._codes: Dict[int, Set[str]] = {}
        for _, methods in self._paths:
            for told in methods.values():
                for status, each in told["responses"].items():
                    examples = each["content"].get("application/json", {}).get("examples", {})
                    self._codes.setdefault(int(status), set()).update(examples)
        self.general = {400, 401, 404, 405, 417, 421, 429, 431, 501, 503, 505}      # may be said before it is known which route is meant

    def check(self, sent: Sent, answer: Answered) -> None:
        """Raises Wrong. sent: the request, whole."""
        if self._secret and self._secret in answer.body:
            raise Wrong("the answer holds the token of the admin")
        told = self._route(sent)
        if sent.method == "OPTIONS" and answer.status == 204:
            return
        documented = told["responses"].get(str(answer.status)) if told else None
        if documented is None and (told or answer.status not in self.general):
            raise Wrong("the status %d is not documented here" % answer.status)
        if answer.status == 500 and not is_failed_run(answer):
            raise Wrong("500")
        if sent.method == "HEAD":
            return
        if answer.status >= 400:
            return self.check_error(answer)
        kind = answer.headers.get("content-type", "").partition(";")[0]
        kinds = documented["content"] if documented else {}
        if kind not in kinds:
            raise Wrong("the type %s is not documented here" % kind)
        if kind == "application/json":
            wrong = self._mismatch(answer.json(), kinds[kind]["schema"], "body")
            if wrong:
                raise Wrong(wrong)
        elif kind == "text/event-stream":
            check_events(answer.body)

    def check_raw(self, answer: Answered) -> None:
        """Raises Wrong. What can be said of the answer to some bytes."""
        if answer.status == 500 and not is_failed_run(answer) or answer.status not in (100, 204, *self._codes):
            raise Wrong("the status %d" % answer.status)
        if answer.status >= 400 and answer.body:
            self.check_error(answer)
        answer.json()

    def check_error(self, answer: Answered) -> None:
        body = answer.json()
        wrong = [self._mismatch(body, {"$ref": "#/components/schemas/" + name}, "body") for name in ("Error", "MessageError",
            "CompletionError")]
        if all(wrong):
            raise Wrong("no error as documented: %s" % answer.body[:300].decode("utf-8", "replace"))
        if wrong[0] is None and body["code"] not in self._codes[answer.status]:
            raise Wrong("the code %s is not documented for %d" % (body["code"], answer.status))

    def _route(self, sent: Sent) -> Optional[Mapping[str, Any]]:
        path = sent.target.partition("?")[0]
        if not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        given = [unquote(part) for part in (path[:-1] if re.search("[^/]/$", path) else path).split("/")]
        method = "get" if sent.method == "HEAD" else sent.method.lower()
        flat = "/".join(part.replace("/", "\0").replace("\n", "\0") for part in given)
        return next((methods[method] for pattern, methods in self._paths if method in methods and pattern.fullmatch(flat)), None)

    def _mismatch(self, value: Any, schema: Mapping[str, Any], place: str) -> Optional[str]:
        """Where a value is not as its schema says; None: nowhere."""
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(KINDS[kind](value) for kind in kinds):
            return "%s is %.80r, not %s" % (place, value, " or ".join(kinds))
        if isinstance(value, dict):
            missing = [name for name in schema.get("required", ()) if name not in value]
            if missing:
                return "%s lacks %s" % (place, ", ".join(missing))
            if "properties" in schema and schema["properties"]:
                extra = [name for name in value if name not in schema["properties"]]
                if extra:
                    return "%s has %s, which is not documented" % (place, ", ".join(extra))
            for name, each in schema.get("properties", {}).items():
                wrong = self._mismatch(value[name], each, place + "." + name) if name in value else None
                if wrong:
                    return wrong
        for n, each in enumerate(value if isinstance(value, list) and "items" in schema else ()):
            wrong = self._mismatch(each, schema["items"], "%s.%d" % (place, n))
            if wrong:
                return wrong
        return None


def is_failed_run(answer: Answered) -> bool:
    """Whether it tells of `claude`, which failed, and not of the bridge."""
    return answer.headers.get("x-should-retry") == "false" and b"Internal server error" not in answer.body


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict), "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool), "number": lambda value: isinstance(value, (int, float))
    and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool), "null": lambda value: value is None}


def check_events(body: bytes) -> None:
    """Raises Wrong where a stream of events is none."""
    if body and not body.endswith(b"\n\n"):
        raise Wrong("the last event breaks off: %r" % body[-100:])
    for line in body.split(b"\n"):
        found = re.fullmatch(rb"(|: ?.*|id: \d+|event: [a-z_]+|data: (.*))", line)
        if not found:
            raise Wrong("no line of an event: %r" % line[:100])
        if found.group(2) not in (None, b"[DONE]"):
            try:
                json.loads(found.group(2).decode("utf-8"), parse_constant=refused)
            except ValueError as error:
                raise Wrong("an event is no JSON: %s" % error) from None


def read_all(data: bytes, is_head: Optional[bool]) -> List[Answered]:
    """All answers on a connection that has ended; nothing may be left over. is_head: to HEAD; None: some may be."""
    found: List[Answered] = []
    at = 0
    while at < len(data):
        try:
            one = read_answer(data[at:], bool(is_head), True)
            follows = data[at + one[1]:at + one[1] + 9] if one else b""
            if follows and follows != b"HTTP/1.1 ":
                raise Wrong("bytes are left over after an answer: %r" % follows)
        except Wrong:
            if is_head is not None:
                raise
            one = read_answer(data[at:], True, True)
        assert one
        found.append(one[0])
        at += one[1]
    return found
