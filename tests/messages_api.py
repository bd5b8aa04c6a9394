"""A stand-in for the Messages API on loopback, which runs the real `claude` without an account.

    with MessagesApi() as api:
        # The default reply echoes the last text of the user.
        api.reply = lambda body: Reply("hello")
        subprocess.run([claude, "-p", "hi"], env={**env, "ANTHROPIC_BASE_URL": api.url, ...})
        # The texts that reached the model, one for each call.
        api.prompts()

`python tests/messages_api.py [PORT]` runs only the stand-in, to try the bridge by hand.
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
    """The answer of the model: text, tool calls, or an HTTP error instead of both."""

    text: str = ""
    # (tool name, input) of each call
    tools: Tuple[Tuple[str, Dict[str, Any]], ...] = ()
    status: int = 200
    error: str = "api_error"
    headers: Dict[str, str] = field(default_factory=dict)
    word_seconds: float = 0.0  # seconds before each word
    # The API sends nothing until this event is set, or until the stand-in is closed.
    hold: Optional[threading.Event] = None
    stop_reason: str = ""
    cut_after: Optional[int] = None  # drop the connection after this many words
    # The text as these deltas. A delta may hold half of a surrogate pair.
    pieces: Tuple[str, ...] = ()
    usage: Dict[str, int] = field(default_factory=dict)  # token counts, if they matter
    ids: Tuple[str, ...] = ()  # of the tool calls, if they matter
    # Thinking blocks in front of the text.
    thinking: Tuple[Dict[str, str], ...] = ()
    # The second half of each tool's input waits for it.
    middle: Optional[threading.Event] = None


@dataclass
class Call:
    """One request, as the stand-in received it."""

    path: str
    headers: Dict[str, str]
    raw: bytes
    body: Dict[str, Any]
    was_left: bool = False  # the client closed the connection before the answer was complete


def last_text(body: Dict[str, Any]) -> str:
    """Return the last text block of the last user message that has one."""
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
    """Return (role, text) of each user and assistant message, without reminders of the CLI."""
    turns = []
    for message in body.get("messages", []):
        content = message["content"]
        if isinstance(content, str):
            texts = [content]
        else:
            texts = [block["text"] for block in content if block.get("type") == "text"]
        if message["role"] in ("user", "assistant"):
            texts = [text for text in texts if not text.startswith("<system-reminder>")]
            turns.append((message["role"], "".join(texts)))
    return turns


def system_text(body: Dict[str, Any]) -> str:
    """Return the system prompt of a request as one text."""
    system = body.get("system") or []
    return system if isinstance(system, str) else "\n".join(block["text"] for block in system)


def tool_results(body: Dict[str, Any]) -> List[Tuple[bool, str]]:
    """Return (is an error, text) for each tool result in the last user message, in call order."""
    content = [message for message in body["messages"] if message["role"] == "user"][-1]["content"]
    blocks = [
        block for block in content if isinstance(block, dict) and block.get("type") == "tool_result"
    ]
    results = []
    for block in sorted(blocks, key=lambda block: int(block["tool_use_id"].rpartition("_")[2])):
        text = block["content"]
        if not isinstance(text, str):
            text = "".join(part.get("text", "") for part in text)
        results.append((bool(block.get("is_error")), text))
    return results


def echo(body: Dict[str, Any]) -> Reply:
    """Reply with the user's own text, through StructuredOutput if the CLI offers that tool."""
    names = [tool.get("name") for tool in body.get("tools", [])]
    content = body["messages"][-1]["content"]
    has_result = isinstance(content, list) and any(
        block.get("type") == "tool_result" for block in content
    )
    if "StructuredOutput" in names and not has_result:
        return Reply(tools=(("StructuredOutput", {"answer": last_text(body)}),))
    return Reply("Echo: " + last_text(body))


def calls_tools(*tools: Tuple[str, Dict[str, Any]]) -> Callable[[Dict[str, Any]], Reply]:
    """Return a model that calls these tools in one turn, and replies "done" to their results."""
    return lambda body: Reply("done") if tool_results(body) else Reply(tools=tools)


def words_of(text: str, reply: Reply) -> List[str]:
    """Split the text into the deltas to send: words if their pace or number matters."""
    if reply.word_seconds or reply.cut_after is not None:
        return re.findall(r"[^ ]* |[^ ]+$", text)
    return [text]


# The program that NotingClaude writes.
NOTING = """#!%s -S
import json, os, signal, subprocess, sys, time
if "-p" not in sys.argv:
    os.execv(%r, [%r] + sys.argv[1:])
real = subprocess.Popen([%r] + sys.argv[1:], stdout=subprocess.PIPE)
signal.signal(signal.SIGTERM, lambda number, frame: real.terminate())
buffered = b""
with open(%r, "ab", buffering=0) as notes:
    for data in iter(lambda: os.read(real.stdout.fileno(), 1 << 16), b""):
        moment, (*lines, buffered) = time.time(), (buffered + data).split(b"\\n")
        noted = [line for line in lines if %r in line]
        notes.write(b"".join(b"[%%.6f, %%s]\\n" %% (moment, line) for line in noted))
        # After the note, so that a test that sees the effect of a line also finds its note.
        sys.stdout.buffer.raw.write(data)
sys.exit(real.wait() %% 256)
"""


class NotingClaude:
    """A wrapper of the real `claude` that passes its output on.

    It notes the lines that contain a word, each with the time at which it arrived.
    """

    def __init__(self, folder: Path, real: Path, word: bytes) -> None:
        folder.mkdir()
        self.path, self._notes = folder / "claude", folder / "notes"
        self._notes.touch()
        self.path.write_text(
            NOTING % (sys.executable, str(real), str(real), str(real), str(self._notes), word)
        )
        self.path.chmod(0o755)

    def lines(self) -> List[Tuple[float, Dict[str, Any]]]:
        """Return (epoch seconds, line) of the noted lines, in order of arrival."""
        notes = map(json.loads, self._notes.read_bytes().splitlines())
        return [(moment, line) for moment, line in notes]


class MessagesApi:
    """The server and the list of its calls; close it, or use it as a context manager."""

    def __init__(self, port: int = 0) -> None:
        self.calls: List[Call] = []
        # "host:port" of each CONNECT request to the stand-in as a proxy; the answer is 403.
        self.outside: List[str] = []
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
                headers = {name.lower(): value for name, value in self.headers.items()}
                call = Call(self.path, headers, raw, body)
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
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="messages-api", daemon=True
        )
        self._thread.start()
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]

    def messages(self) -> List[Call]:
        """Return the calls that sent the model a prompt of a user."""
        with self._lock:
            return [
                call
                for call in self.calls
                if call.path.startswith("/v1/messages") and "count_tokens" not in call.path
            ]

    def prompts(self) -> List[str]:
        """Return the last user text of each of these calls."""
        return [last_text(call.body) for call in self.messages()]

    def _answer(self, handler: BaseHTTPRequestHandler, body: Dict[str, Any]) -> None:
        if "count_tokens" in handler.path:
            return self._json(handler, 200, {"input_tokens": 10})
        if not handler.path.startswith("/v1/messages"):
            return self._error(handler, 404, "not_found_error", "not here")
        reply = self.reply(body)
        deadline = time.monotonic() + 60
        while reply.hold is not None and not reply.hold.wait(0.1):
            if self._closing or time.monotonic() >= deadline:
                break
        if reply.status != 200:
            return self._error(handler, reply.status, reply.error, reply.text, reply.headers)
        message = {
            "id": "msg_%d" % len(self.calls), "type": "message", "role": "assistant",
            "model": body.get("model", "m"), "content": [], "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": 10,
                "output_tokens": 1,
                "cache_read_input_tokens": 5,
                "cache_creation_input_tokens": 3,
                **reply.usage,
            },
        }
        text = "".join(reply.pieces) or reply.text
        final_usage = {"output_tokens": 7, **reply.usage}
        blocks: List[Dict[str, Any]] = [dict(block) for block in reply.thinking]
        if text or not reply.tools:
            blocks.append({"type": "text", "text": text})
        for n, (name, args) in enumerate(reply.tools):
            call_id = reply.ids[n] if reply.ids else "toolu_%d_%d" % (len(self.calls), n)
            blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": args})
        stop = reply.stop_reason or ("tool_use" if reply.tools else "end_turn")
        if not body.get("stream"):
            usage = {**message["usage"], **final_usage}
            message.update(content=blocks, stop_reason=stop, usage=usage)
            return self._json(handler, 200, message, reply.headers)
        self._stream(handler, reply, message, blocks, stop, final_usage["output_tokens"])

    def _error(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        kind: str,
        message: str,
        headers: Optional[Dict[str, str]] = None,
    ) -> None:
        body = {"type": "error", "error": {"type": kind, "message": message}}
        self._json(handler, status, body, headers)

    def _json(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: Any,
        headers: Optional[Dict[str, str]] = None,
    ) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        defaults = {"content-type": "application/json", "request-id": "req_1"}
        for name, value in {**defaults, **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _stream(
        self,
        handler: BaseHTTPRequestHandler,
        reply: Reply,
        message: Dict[str, Any],
        blocks: List[Dict[str, Any]],
        stop: str,
        output_tokens: int,
    ) -> None:
        handler.send_response(200)
        defaults = {"content-type": "text/event-stream", "request-id": "req_1"}
        for name, value in {**defaults, **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.close_connection = True

        def event(kind: str, **data: Any) -> None:
            text = json.dumps({"type": kind, **data})
            handler.wfile.write(("event: %s\ndata: %s\n\n" % (kind, text)).encode())

        event("message_start", message=message)
        for index, block in enumerate(blocks):
            if block["type"] == "text":
                event(
                    "content_block_start", index=index, content_block={"type": "text", "text": ""}
                )
                for n, piece in enumerate(reply.pieces or words_of(block["text"], reply)):
                    if reply.cut_after is not None and n >= reply.cut_after:
                        return
                    if reply.word_seconds:
                        time.sleep(reply.word_seconds)
                    event(
                        "content_block_delta", index=index,
                        delta={"type": "text_delta", "text": piece},
                    )
            elif block["type"] == "tool_use":
                event("content_block_start", index=index, content_block={**block, "input": {}})
                text = json.dumps(block["input"])
                for n, piece in enumerate(("", text[: len(text) // 2], text[len(text) // 2 :])):
                    if reply.word_seconds:
                        time.sleep(reply.word_seconds)
                    if n == 2 and reply.middle is not None:
                        reply.middle.wait(20)
                    delta = {"type": "input_json_delta", "partial_json": piece}
                    event("content_block_delta", index=index, delta=delta)
            elif block["type"] == "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                event("content_block_start", index=index, content_block=empty)
                for piece in re.findall(r"[^ ]* |[^ ]+$", block["thinking"]):
                    delta = {"type": "thinking_delta", "thinking": piece}
                    event("content_block_delta", index=index, delta=delta)
                delta = {"type": "signature_delta", "signature": block["signature"]}
                event("content_block_delta", index=index, delta=delta)
            else:
                event("content_block_start", index=index, content_block=block)
            event("content_block_stop", index=index)
        event(
            "message_delta", delta={"stop_reason": stop, "stop_sequence": None},
            usage={"output_tokens": output_tokens},
        )
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
