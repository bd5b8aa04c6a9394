"""A stand-in of the Messages API on loopback, for driving the real `claude` without an account.

    with MessagesApi() as api:
        api.reply = lambda body: Reply("hello")          # default: echoes the last text of the user
        subprocess.run([claude, "-p", "hi"], env={**env, "ANTHROPIC_BASE_URL": api.url, ...})
        api.prompts()                                    # what reached the model, one text per call

`python tests/messages_api.py [PORT]` runs it alone, to try the bridge by hand.
"""
from __future__ import annotations

import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple


@dataclass
class Reply:
    """What the model says: text, or tool calls, or an HTTP error instead of both."""
    text: str = ""
    tools: Tuple[Tuple[str, Dict[str, Any]], ...] = ()   # (tool name, input)
    status: int = 200
    error: str = "api_error"
    headers: Dict[str, str] = field(default_factory=dict)
    word_seconds: float = 0.0                            # pause before each word
    hold: Optional[threading.Event] = None               # nothing is sent until it is set, or the stand-in is closed
    stop_reason: str = ""
    cut_after: Optional[int] = None                      # drop the connection after so many words
    pieces: Tuple[str, ...] = ()                         # the text as these deltas; one may hold half of a surrogate pair
    usage: Dict[str, int] = field(default_factory=dict)  # token counts, where they matter
    ids: Tuple[str, ...] = ()                            # of the tool calls, where they matter


@dataclass
class Context:
    """One request as it arrived."""
    path: str
    headers: Dict[str, str]
    raw: bytes
    body: Dict[str, Any]
    was_left: bool = False                               # the client closed the connection before the answer was whole


def last_text(body: Dict[str, Any]) -> str:
    """The last text block of the last user message."""
    for message in reversed(body.get("messages", [])):
        if message["role"] != "user":
            continue
        content = message["content"]
        if isinstance(content, str):
            return content
        texts = [block["text"] for block in content if block.get("type") == "text"]
        if texts:
            return texts[-1]
    return ""


def turn_texts(body: Dict[str, Any]) -> List[Tuple[str, str]]:
    """(role, text) per message of user and assistant; reminder blocks that the CLI adds are left out."""
    turns = []
    for message in body.get("messages", []):
        content = message["content"]
        blocks = [content] if isinstance(content, str) else [b["text"] for b in content if b.get("type") == "text"]
        if message["role"] in ("user", "assistant"):
            turns.append((message["role"], "".join(t for t in blocks if not t.startswith("<system-reminder>"))))
    return turns


def system_text(body: Dict[str, Any]) -> str:
    """All instructions of a request, as one text."""
    system = body.get("system") or []
    return system if isinstance(system, str) else "\n".join(block["text"] for block in system)


def tool_results(body: Dict[str, Any]) -> List[Tuple[bool, str]]:
    """(is an error, text) per tool result in the last message of the user, in the order of the calls."""
    content = [message for message in body["messages"] if message["role"] == "user"][-1]["content"]
    blocks = [block for block in content if isinstance(block, dict) and block.get("type") == "tool_result"]
    return [(bool(block.get("is_error")), block["content"] if isinstance(block["content"], str)
             else "".join(part.get("text", "") for part in block["content"]))
            for block in sorted(blocks, key=lambda block: int(block["tool_use_id"].rpartition("_")[2]))]


def is_warm_up(body: Dict[str, Any]) -> bool:
    """What 2.0.76 sends by itself from every process."""
    return last_text(body) in ("quota", "Warmup")


def echo(body: Dict[str, Any]) -> Reply:
    """Answers with the user's own words, and calls StructuredOutput where the CLI asks for it."""
    names = [tool.get("name") for tool in body.get("tools", [])]
    answered = isinstance(body["messages"][-1]["content"], list) and any(
        block.get("type") == "tool_result" for block in body["messages"][-1]["content"])
    if "StructuredOutput" in names and not answered:
        return Reply(tools=(("StructuredOutput", {"answer": last_text(body)}),))
    return Reply("Echo: " + last_text(body))


def calls_tools(*tools: Tuple[str, Dict[str, Any]]) -> Callable[[Dict[str, Any]], Reply]:
    """A model that calls these tools at once, and says "done" when it has their results."""
    return lambda body: Reply("done") if tool_results(body) else Reply(tools=tools)


def words_of(text: str, reply: Reply) -> List[str]:
    """The text as it is sent: word by word where their pace or number matters."""
    return re.findall(r"[^ ]* |[^ ]+$", text) if reply.word_seconds or reply.cut_after is not None else [text]


NOTING = """#!%s -S
import json, os, signal, subprocess, sys, time
if "-p" not in sys.argv:
    os.execv(%r, [%r] + sys.argv[1:])
real = subprocess.Popen([%r] + sys.argv[1:], stdout=subprocess.PIPE)
signal.signal(signal.SIGTERM, lambda number, frame: real.terminate())
held = b""
with open(%r, "ab", buffering=0) as notes:
    for data in iter(lambda: os.read(real.stdout.fileno(), 1 << 16), b""):
        at, (*lines, held) = time.time(), (held + data).split(b"\\n")
        kept = [line for line in lines if %r in line]
        notes.write(b"".join(b"[%%.6f, %%s]\\n" %% (at, line) for line in kept))
        sys.stdout.buffer.raw.write(data)            # after the note: who has seen what followed from a line finds it noted
sys.exit(real.wait() %% 256)
"""


class NotingClaude:
    """A `claude` in front of the real one, which hands on all it writes and keeps the lines that hold a word, with the
    moment at which they came."""

    def __init__(self, folder: Path, real: Path, word: bytes) -> None:
        folder.mkdir()
        self.path, self._notes = folder / "claude", folder / "notes"
        self._notes.touch()
        self.path.write_text(NOTING % (sys.executable, str(real), str(real), str(real), str(self._notes), word))
        self.path.chmod(0o755)

    def lines(self) -> List[Tuple[float, Dict[str, Any]]]:
        """(epoch seconds, line), in the order of coming."""
        return [(at, line) for at, line in map(json.loads, self._notes.read_bytes().splitlines())]


class MessagesApi:
    """Owns the server and the list of calls; close it, or use it as a context manager."""

    def __init__(self, port: int = 0) -> None:
        self.calls: List[Context] = []
        self.outside: List[str] = []                     # "host:port" of what was asked of us as a proxy, and refused
        self.reply: Callable[[Dict[str, Any]], Reply] = echo
        self._lock = threading.Lock()
        self._closing = False
        api = self

        class ConnectionHandler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()

            do_GET = do_HEAD

            def do_CONNECT(self) -> None:
                api.outside.append(self.path)
                self.send_error(403)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(raw) if raw else {}
                call = Context(self.path, {k.lower(): v for k, v in self.headers.items()}, raw, body)
                with api._lock:
                    api.calls.append(call)
                try:
                    api._answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = call.was_left = True

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", port), ConnectionHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="messages-api", daemon=True)
        self._thread.start()
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]

    def messages(self) -> List[Context]:
        """The calls that asked the model something."""
        with self._lock:
            return [call for call in self.calls
                    if call.path.startswith("/v1/messages") and "count_tokens" not in call.path and not is_warm_up(call.body)]

    def prompts(self) -> List[str]:
        return [last_text(call.body) for call in self.messages()]

    def _answer(self, handler: BaseHTTPRequestHandler, body: Dict[str, Any]) -> None:
        if "count_tokens" in handler.path:
            return self._json(handler, 200, {"input_tokens": 10})
        if not handler.path.startswith("/v1/messages"):
            return self._json(handler, 404, {"type": "error", "error": {"type": "not_found_error", "message": "not here"}})
        reply = echo(body) if is_warm_up(body) else self.reply(body)
        until = time.monotonic() + 60
        while reply.hold is not None and not reply.hold.wait(0.1) and not self._closing and time.monotonic() < until:
            pass
        if reply.status != 200:
            return self._json(handler, reply.status, {"type": "error", "error": {"type": reply.error, "message": reply.text}},
                              reply.headers)
        message = {"id": "msg_%d" % len(self.calls), "type": "message", "role": "assistant", "model": body.get("model", "m"),
                   "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3,
                             **reply.usage}}
        text, used = "".join(reply.pieces) or reply.text, {"output_tokens": 7, **reply.usage}
        blocks: List[Dict[str, Any]] = [{"type": "text", "text": text}] if text or not reply.tools else []
        blocks += [{"type": "tool_use", "id": reply.ids[n] if reply.ids else "toolu_%d_%d" % (len(self.calls), n), "name": name, "input": args}
                   for n, (name, args) in enumerate(reply.tools)]
        stop = reply.stop_reason or ("tool_use" if reply.tools else "end_turn")
        if not body.get("stream"):
            message.update(content=blocks, stop_reason=stop, usage={**message["usage"], **used})
            return self._json(handler, 200, message, reply.headers)
        self._stream(handler, reply, message, blocks, stop, used["output_tokens"])

    def _json(self, handler: BaseHTTPRequestHandler, status: int, body: Any, headers: Optional[Dict[str, str]] = None) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"content-type": "application/json", "request-id": "req_1", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _stream(self, handler: BaseHTTPRequestHandler, reply: Reply, message: Dict[str, Any],
                blocks: List[Dict[str, Any]], stop: str, output_tokens: int) -> None:
        handler.send_response(200)
        for name, value in {"content-type": "text/event-stream", "request-id": "req_1", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.close_connection = True

        def event(kind: str, **data: Any) -> None:
            handler.wfile.write(("event: %s\ndata: %s\n\n" % (kind, json.dumps({"type": kind, **data}))).encode())

        event("message_start", message=message)
        for index, block in enumerate(blocks):
            if block["type"] == "text":
                event("content_block_start", index=index, content_block={"type": "text", "text": ""})
                for n, piece in enumerate(reply.pieces or words_of(block["text"], reply)):
                    if reply.cut_after is not None and n >= reply.cut_after:
                        return
                    if reply.word_seconds:
                        time.sleep(reply.word_seconds)
                    event("content_block_delta", index=index, delta={"type": "text_delta", "text": piece})
            else:
                event("content_block_start", index=index, content_block={**block, "input": {}})
                event("content_block_delta", index=index,
                      delta={"type": "input_json_delta", "partial_json": json.dumps(block["input"])})
            event("content_block_stop", index=index)
        event("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage={"output_tokens": output_tokens})
        event("message_stop")

    def close(self) -> None:
        self._closing = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> "MessagesApi":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


if __name__ == "__main__":
    stand_in = MessagesApi(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(stand_in.url, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        stand_in.close()
