#!/usr/bin/env bash
# Claude Code answers a late `initialize` with success and takes only a part of it.
#
# Expected: the control request `initialize` of the stream-json protocol gives a process its
#   system prompt, JSON Schema and MCP servers. If it comes too late for that, it is refused, or
#   the answer says which fields were left out.
# Happens: after any user line, even one with "shouldQuery": false that starts no turn, the
#   FIRST initialize of a process is answered as always. But systemPrompt and jsonSchema are
#   dropped: the model gets the CLI's own system prompt and no StructuredOutput tool. The MCP
#   servers of the same request are connected and their tools offered. So a program that seeds
#   a history first loses its instructions and has nothing to notice it by. Other control
#   requests may come first: after set_model all fields are taken.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-28. The types of the official SDK 0.3.332 speak of a repeated initialize,
#   not of a late one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --prefix 2.1.332 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
npm install --prefix 2.1.197 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.197
cat >check.py <<'PY'
import http.server, json, os, subprocess, sys, threading

requests = []

class Api(http.server.BaseHTTPRequestHandler):
    """Keeps each request and answers "fine"."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for kind, rest in (
                ("message_start", {"message": {
                    "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
                    "content": [], "stop_reason": None,
                    "usage": {"input_tokens": 1, "output_tokens": 1}}}),
                ("content_block_start", {
                    "index": 0, "content_block": {"type": "text", "text": ""}}),
                ("content_block_delta", {
                    "index": 0, "delta": {"type": "text_delta", "text": "fine"}}),
                ("content_block_stop", {"index": 0}),
                ("message_delta", {
                    "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
                ("message_stop", {})):
            event = json.dumps({"type": kind, **rest})
            self.wfile.write(f"event: {kind}\ndata: {event}\n\n".encode())

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
os.environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{api.server_port}"

MCP_ANSWERS = {
    "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                   "serverInfo": {"name": "box", "version": "1"}},
    "tools/list": {"tools": [{"name": "put", "inputSchema": {"type": "object"}}]}}

class Claude:
    def __init__(self, version):
        self.process = subprocess.Popen(
            [f"{version}/node_modules/.bin/claude", "-p", "--verbose",
             "--input-format=stream-json", "--output-format=stream-json", "--tools=",
             "--no-session-persistence"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, line):
        print(json.dumps(line), file=self.process.stdin, flush=True)

    def ask(self, line, kind):
        """Send a line, serve the MCP server "box", and return the next line of this kind."""
        self.send(line)
        for answer in map(json.loads, self.process.stdout):
            if answer["type"] == kind:
                return answer
            if answer["type"] == "control_request":
                message = answer["request"]["message"]
                reply = {"jsonrpc": "2.0", "id": message.get("id"),
                         "result": MCP_ANSWERS.get(message["method"], {})}
                self.send({"type": "control_response", "response": {
                    "subtype": "success", "request_id": answer["request_id"],
                    "response": {"mcp_response": reply}}})

    def turn(self, text, **fields):
        message = {"role": "user", "content": text}
        self.ask({"type": "user", "message": message, **fields}, "result")

    def control(self, **request):
        line = {"type": "control_request", "request_id": "1", "request": request}
        return self.ask(line, "control_response")["response"]

def run(version, before):
    """Do something, initialize, ask: what initialize answers and what the model is offered."""
    requests.clear()
    claude = Claude(version)
    if before == "user line without a turn":
        claude.turn("It is Monday.", shouldQuery=False)
    elif before == "user line":
        claude.turn("Hello.")
    elif before == "set_model":
        claude.control(subtype="set_model", model="haiku")
    answer = claude.control(
        subtype="initialize", systemPrompt=["Speak French."], sdkMcpServers=["box"],
        jsonSchema={"type": "object", "properties": {"day": {"type": "string"}}})
    claude.turn("Which day is it?")
    claude.process.communicate()
    request = requests[-1]
    # With a schema the CLI asks once more, for the tool call that the stand-in never makes.
    tools = {tool["name"] for tool in request.get("tools", ())}
    return (answer["subtype"], sorted(answer["response"]),
            request["system"][-1]["text"] == "Speak French.",
            "StructuredOutput" in tools, "mcp__box__put" in tools)

as_before = True
for version in "2.1.332", "2.1.197":
    complete = None
    for before, is_taken in (("nothing", True), ("set_model", True),
                             ("user line without a turn", False), ("user line", False)):
        subtype, keys, *seen = run(version, before)
        complete = complete or keys
        print(f"{version}, {before} before initialize: {subtype}, {len(keys)} fields;",
              "systemPrompt {}, jsonSchema {}, sdkMcpServers {}".format(
                  *("taken" if taken else "DROPPED" for taken in seen)))
        as_before &= (subtype, keys, seen) == ("success", complete, [is_taken, is_taken, True])
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
