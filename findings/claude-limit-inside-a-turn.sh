#!/usr/bin/env bash
# Inside a turn, Claude Code 2.1.332 takes one half of an "env" and puts the other half off.
#
# Expected: in `claude -p` with stream-json input and output, a program sends the control request
#   apply_flag_settings while a tool call of the turn waits for its result. The types of the
#   official SDK call it "updating the active configuration" and "applied mid-session", and they
#   name no variable that waits for the next turn. So the variables of one "env" object take
#   effect together: with the next request to the API, as in 2.1.197, or all with the next turn.
# Happens: CLAUDE_CODE_DISABLE_THINKING is obeyed by the next request of the turn. But
#   CLAUDE_CODE_MAX_OUTPUT_TOKENS from the same object is not: "max_tokens" keeps its old value
#   for all requests of that turn, up to the next user line. The answer is a success, and
#   get_settings shows the new value during that turn. It does not matter whether the limit is
#   raised, lowered or set for the first time. So a program that lowers it for the answer after
#   a tool call may pay for a longer one, and one that raises it may get an answer that is cut.
#   What does change max_tokens inside the turn in 2.1.332: "max_tokens" in the variable
#   CLAUDE_CODE_EXTRA_BODY, or another "model" in the same control request. With that the new
#   limit is taken, too, and the next request goes to the new model. In 2.1.197 it is just the
#   reverse: the limit comes with the next request and the model with the next turn.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-29. The types are those of the official SDK 0.3.332.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 2.1.332 2.1.197; do
  npm install --prefix $version --silent --no-audit --no-fund @anthropic-ai/claude-code@$version
  $version/node_modules/.bin/claude --version
done
cat >turns.py <<'PY'
import itertools, json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

bodies = []

def model(body):
    """Call the offered tool until the history holds two results, then say "done"."""
    contents = [m["content"] for m in body["messages"] if isinstance(m["content"], list)]
    results = [b for b in itertools.chain(*contents) if b["type"] == "tool_result"]
    if len(results) >= 2:
        return "end_turn", {"type": "text", "text": ""}, {"type": "text_delta", "text": "done"}
    offered = [tool["name"] for tool in body["tools"] if tool["name"].endswith("look")]
    call = {"type": "tool_use", "id": f"toolu_{len(results)}", "name": offered[0], "input": {}}
    return "tool_use", call, {"type": "input_json_delta", "partial_json": "{}"}

class StandIn(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def event(self, kind, **fields):
        text = json.dumps({"type": kind, **fields})
        self.wfile.write(f"event: {kind}\ndata: {text}\n\n".encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        bodies.append(body)
        stop, block, delta = model(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.event("message_start", message={
            "id": f"msg_{len(bodies)}", "type": "message", "role": "assistant", "content": [],
            "model": body["model"], "stop_reason": None,
            "usage": {"input_tokens": 1, "output_tokens": 1}})
        self.event("content_block_start", index=0, content_block=block)
        self.event("content_block_delta", index=0, delta=delta)
        self.event("content_block_stop", index=0)
        self.event("message_delta", delta={"stop_reason": stop}, usage={"output_tokens": 2})
        self.event("message_stop")

server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
Thread(target=server.serve_forever, daemon=True).start()
os.environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"

FIRST_MODEL, SECOND_MODEL = "claude-opus-4-8", "claude-opus-4-7"
# What the MCP server of this program answers; a call is answered by hand.
TOOL = {"name": "look", "description": "Look.", "inputSchema": {"type": "object"}}
MCP = {
    "initialize": lambda params: {
        "protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
        "serverInfo": {"name": "host", "version": "1"}},
    "tools/list": lambda params: {"tools": [TOOL]}}

class Session:
    def __init__(self, version):
        command = [f"{version}/node_modules/.bin/claude", "-p", "--verbose", "--tools=",
                   "--input-format=stream-json", "--output-format=stream-json",
                   f"--model={FIRST_MODEL}", "--allowedTools=mcp__host__look",
                   "--no-session-persistence"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, kind, **fields):
        print(json.dumps({"type": kind, **fields}), file=self.process.stdin, flush=True)

    def wait(self, awaited):
        """Read up to a line of this type, or "tools/call"; answer other MCP messages."""
        for line in map(json.loads, self.process.stdout):
            if line["type"] == "control_request":
                method = line["request"]["message"]["method"]
                if method == awaited:
                    return line
                params = line["request"]["message"].get("params")
                self.answer(line, MCP.get(method, lambda params: {})(params))
            elif line["type"] == awaited:
                return line
            elif line["type"] == "result":
                break
        raise RuntimeError(f"no {awaited}")

    def answer(self, line, result):
        number = line["request"]["message"].get("id", 0)
        answer = {"mcp_response": {"jsonrpc": "2.0", "id": number, "result": result}}
        self.send("control_response", response={
            "subtype": "success", "request_id": line["request_id"], "response": answer})

    def control(self, subtype, **fields):
        self.send("control_request", request_id=subtype, request={"subtype": subtype, **fields})
        response = self.wait("control_response")["response"]
        assert response["request_id"] == subtype, response
        return response

    def user(self, text):
        self.send("user", message={"role": "user", "content": text})

def run(version, first, second):
    """Apply `second` during the first of two tool calls of a turn; then ask for another turn."""
    bodies.clear()
    session = Session(version)
    session.control("initialize", sdkMcpServers=["host"])
    answers = [session.control("apply_flag_settings", settings=first)["subtype"]]
    session.user("Look twice.")
    call = session.wait("tools/call")
    answers.append(session.control("apply_flag_settings", settings=second)["subtype"])
    shown = session.control("get_settings")["response"]["effective"]["env"]
    seen = {"content": [{"type": "text", "text": "seen"}]}
    session.answer(call, seen)
    session.answer(session.wait("tools/call"), seen)
    answers.append(session.wait("result")["subtype"])
    session.user("Thanks.")
    answers.append(session.wait("result")["subtype"])
    session.process.communicate()
    is_fine = answers == ["success"] * 4 and shown == second["env"]
    rows = [(body["max_tokens"], "thinking" in body, body["model"]) for body in bodies]
    return is_fine, [list(column) for column in zip(*rows)]

LIMIT, BODY = "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_EXTRA_BODY"

def limit(tokens):
    return {LIMIT: str(tokens)}

def extra(tokens):
    return {BODY: json.dumps({"max_tokens": tokens})}

# A name, the two values of "env" and other settings with the second, and the limits that these
# mean (None: the CLI's own).
cases = [
    ("raised", limit(100), limit(9000), {}, (100, 9000)),
    ("lowered", limit(9000), limit(100), {}, (9000, 100)),
    ("set for the first time", {}, limit(100), {}, (None, 100)),
    ("by the extra body", extra(100), extra(9000), {}, (100, 9000)),
    ("with another model", limit(100), limit(9000), {"model": SECOND_MODEL}, (100, 9000))]
# The requests: before the change, two after it in the same turn, and one in the next turn.
AT_ONCE, NEXT_TURN = [0, 1, 1, 1], [0, 0, 0, 1]
as_described = True
for version in "2.1.332", "2.1.197":
    for name, first, second, others, values in cases:
        first = {"env": {**first, "CLAUDE_CODE_DISABLE_THINKING": ""}}
        second = {"env": {**second, "CLAUDE_CODE_DISABLE_THINKING": "1"}, **others}
        is_fine, (limits, thoughts, models) = run(version, first, second)
        print(f"{version}, limit {name}:")
        print("    max_tokens", limits, " thinking", ["off", "on"][thoughts[0]], "then",
              *(["off", "on"][thought] for thought in thoughts[1:]))
        print("    models", *models)
        print("    all answers success, get_settings shows the new env in the turn:", is_fine)
        values = (limits[0] if values[0] is None else values[0], values[1])
        is_new = version == "2.1.332"
        has_old_limit = is_new and LIMIT in second["env"] and not others
        steps = NEXT_TURN if has_old_limit else AT_ONCE
        as_described &= is_fine and values[0] != values[1]
        as_described &= limits == [values[step] for step in steps]
        as_described &= thoughts == [True, False, False, False]
        model_names = FIRST_MODEL, others.get("model", FIRST_MODEL)
        model_steps = AT_ONCE if is_new else NEXT_TURN
        as_described &= models == [model_names[step] for step in model_steps]
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 300 python3 turns.py
