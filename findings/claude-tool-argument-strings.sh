#!/usr/bin/env bash
# Claude Code parses a tool argument that is a string, although the schema allows the string.
#
# Expected: a tool's property may be "a string or an array" (or "a string or an object"). The
#   model writes a string that happens to hold JSON, say the content of a file. It is valid as
#   it stands, so the tool should get that string.
# Happens: the tool gets the parsed array or object. Large integers in it lose their last
#   digits on the way. The stream's input_json_delta still shows the string; the assistant line,
#   the tools/call and the history of the next API request all hold the changed value. Only
#   arrays and objects, and only properties of the first level: "5" for "string or integer" and
#   a nested property stay. So the deltas and the call contradict each other.
# Versions: @anthropic-ai/claude-code 2.1.332, Python 3.9 or newer. Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --prefix "$work" --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
cat >"$work/check.py" <<'PY'
import http.server, json, subprocess, sys, threading

STRING, INTEGER, ARRAY = ({"type": name} for name in ("string", "integer", "array"))
# name: (schema of the property, what the model writes, what the tool is given)
CASES = {
    "string": (STRING, "[1]", "[1]"),
    "string or integer": ({"anyOf": [STRING, INTEGER]}, "5", "5"),
    "nested string or array": (
        {"type": "object", "properties": {"w": {"anyOf": [STRING, ARRAY]}}},
        {"w": "[1]"}, {"w": "[1]"}),
    "string or array": ({"anyOf": [STRING, ARRAY]}, "[1]", [1]),
    "string or object": ({"type": ["string", "object"]}, '{"id": 12345678901234567890}',
                         {"id": 12345678901234567000}),
}
requests, value = [], None

def events():
    yield {"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "stop_reason": None, "usage": {"input_tokens": 1, "output_tokens": 1}}}
    if len(requests) == 1:
        block = {"type": "tool_use", "id": "toolu_1", "name": "mcp__box__put", "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps({"v": value})}
    else:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": "done"}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    stop = "tool_use" if len(requests) == 1 else "end_turn"
    yield {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 2}}
    yield {"type": "message_stop"}

class Api(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in events():
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
environment = {
    "PATH": sys.argv[2], "HOME": sys.argv[3], "ANTHROPIC_API_KEY": "none",
    "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{api.server_port}",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}

def run(schema):
    """One turn with the tool `put`: streamed, shown, called, told again to the API."""
    requests.clear()
    claude = subprocess.Popen(
        [sys.argv[1], "-p", "--verbose", "--input-format=stream-json",
         "--output-format=stream-json", "--include-partial-messages", "--tools", "",
         "--allowedTools=mcp__box", "--no-session-persistence"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    send = lambda line: print(json.dumps(line), file=claude.stdin, flush=True)
    send({"type": "control_request", "request_id": "1",
          "request": {"subtype": "initialize", "sdkMcpServers": ["box"]}})
    send({"type": "user", "message": {"role": "user", "content": "go"}})
    answers = {
        "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                       "serverInfo": {"name": "box", "version": "1"}},
        "tools/list": {"tools": [
            {"name": "put", "inputSchema": {"type": "object", "properties": {"v": schema}}}]},
        "tools/call": {"content": [{"type": "text", "text": "ok"}]}}
    streamed, shown, called = "", None, None
    for line in map(json.loads, claude.stdout):
        if line["type"] == "control_request":
            message = line["request"]["message"]
            if message["method"] == "tools/call":
                called = message["params"]["arguments"]["v"]
            reply = {"jsonrpc": "2.0", "id": message.get("id"),
                     "result": answers.get(message["method"], {})}
            send({"type": "control_response", "response": {
                "subtype": "success", "request_id": line["request_id"],
                "response": {"mcp_response": reply}}})
        elif line["type"] == "stream_event":
            streamed += line["event"].get("delta", {}).get("partial_json", "")
        elif line["type"] == "assistant" and "input" in line["message"]["content"][0]:
            shown = line["message"]["content"][0]["input"]["v"]
        elif line["type"] == "result":
            claude.stdin.close()
    told = [block["input"]["v"] for message in requests[-1]["messages"]
            for block in message["content"]
            if message["role"] == "assistant" and block["type"] == "tool_use"]
    return json.loads(streamed)["v"], shown, called, told[0]

as_before = True
for name, (schema, value, given) in CASES.items():
    seen = run(schema)
    print(f"{name}: streamed, shown, called, told again:", *map(json.dumps, seen), sep="  ")
    as_before &= seen == (value, given, given, given)
sys.exit(0 if as_before else 1)
PY
claude=$work/node_modules/.bin/claude
"$claude" --version
env -i PATH="$PATH" timeout 200 python3 "$work/check.py" "$claude" "$PATH" "$work"
