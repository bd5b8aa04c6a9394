#!/usr/bin/env bash
# What Claude Code tells the model of an MCP tool's result: one half, and not always the same.
#
# Expected: a tool of the official Python MCP SDK that returns a str gives the model that text.
#   Its result holds the text twice: as a text block, and as structuredContent, because the SDK
#   derives an output schema {"result": string} from the annotation "-> str".
# Happens: Claude Code throws the text block away and tells the model the JSON instead: one
#   line, each newline and quotation mark escaped, {"result":"..."} around it. Without the
#   annotation the same function gives the plain text. A tool that writes prose for the model
#   and numbers as structuredContent has its prose dropped; when it marks the result with
#   isError, the prose is told and the numbers are dropped, and so is an image.
# Versions: @anthropic-ai/claude-code 2.1.332 (npm), mcp 2.3.0 (PyPI; Python 3.10 or newer).
#   Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
python3 -m venv python
python/bin/pip install --quiet --disable-pip-version-check mcp==2.3.0
cat >server.py <<'PY'
from mcp.server.mcpserver import MCPServer
from mcp.types import CallToolResult, ImageContent, TextContent

server = MCPServer("notes")
PAGE = 'first line\nsaid "hello"\n'
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNg"
         "AAAAAgABSK+kcQAAAABJRU5ErkJggg==")

@server.tool()
def annotated() -> str:
    return PAGE

@server.tool()
def bare():
    return PAGE

def both(is_error: bool) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text="two rows are late"),
                 ImageContent(type="image", data=PIXEL, mime_type="image/png")],
        structured_content={"late": 2}, is_error=is_error)

@server.tool()
def good() -> CallToolResult:
    return both(False)

@server.tool()
def failed() -> CallToolResult:
    return both(True)

server.run()
PY
cat >check.py <<'PY'
import http.server, json, os, subprocess, sys, threading

tool, results = "", []

class Api(http.server.BaseHTTPRequestHandler):
    """Asks for `tool` first, and keeps what it is told of its result."""

    def log_message(self, *_):
        pass

    def say(self, kind, **rest):
        self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **rest})}\n\n".encode())

    def do_POST(self):
        messages = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
        told = [block for message in messages if isinstance(message["content"], list)
                for block in message["content"] if block["type"] == "tool_result"]
        results.extend(told)
        block = {"type": "text", "text": "done"} if told else {
            "type": "tool_use", "id": "toolu_1", "name": f"mcp__notes__{tool}", "input": {}}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.say("message_start", message={
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
            "stop_reason": None, "usage": {"input_tokens": 1, "output_tokens": 1}})
        self.say("content_block_start", index=0, content_block=block)
        self.say("content_block_stop", index=0)
        self.say("message_delta", usage={"output_tokens": 2},
                 delta={"stop_reason": "end_turn" if told else "tool_use"})
        self.say("message_stop")

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
notes = {"command": sys.executable, "args": [os.path.abspath("server.py")]}
servers = {"mcpServers": {"notes": notes}}
seen = {}
for tool in "annotated", "bare", "good", "failed":
    results.clear()
    subprocess.run(
        ["node_modules/.bin/claude", "-p", "go", "--tools=", "--allowedTools=mcp__notes",
         "--mcp-config", json.dumps(servers), "--no-session-persistence"],
        env={**os.environ, "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{api.server_port}"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=60)
    content = results[-1]["content"]
    seen[tool] = content if isinstance(content, str) else [
        block.get("text", block["type"]) for block in content]
    print(f"{tool}:", json.dumps(seen[tool]))
sys.exit(seen != {
    "annotated": r'{"result":"first line\nsaid \"hello\"\n"}',
    "bare": ['first line\nsaid "hello"\n'],
    "good": ["image", '{"late":2}'],
    "failed": "two rows are late"})
PY
node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 python/bin/python check.py
