#!/usr/bin/env bash
# Claude Code answers a refused rewind_conversation with the subtype "success".
#
# Expected: in the stream-json protocol a control request that was not carried out is answered
#   with the subtype "error", as a request is that the CLI does not know.
# Happens: the control request rewind_conversation goes back to an earlier user line, named by
#   its uuid. When it refuses, the answer is "success" all the same, and only the body says
#   "rewound": false. A program that looks at the subtype, as for the other requests, sends its
#   next prompt behind messages that it takes for removed.
#   What is refused differs. Without last_seen_user_message_uuid both versions go back over the
#   last user line only. With it, 2.1.332 goes back to any; 2.1.197 refuses as before. 2.1.332
#   gives a "reason" with the refusal, 2.1.197 only the sentence "error".
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-28. The types of the official SDK 0.3.332 do not name it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --prefix 2.1.332 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
npm install --prefix 2.1.197 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.197
cat >check.py <<'PY'
import http.server, json, os, subprocess, sys, threading, uuid

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

class Claude:
    def __init__(self, version):
        self.process = subprocess.Popen(
            [f"{version}/node_modules/.bin/claude", "-p", "--verbose",
             "--input-format=stream-json", "--output-format=stream-json", "--tools=",
             "--no-session-persistence"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line, kind):
        """Send a line and return the next line of this kind."""
        print(json.dumps(line), file=self.process.stdin, flush=True)
        return next(answer for answer in map(json.loads, self.process.stdout)
                    if answer["type"] == kind)

    def turn(self, text, own_id):
        message = {"role": "user", "content": text}
        self.ask({"type": "user", "uuid": own_id, "message": message}, "result")

    def control(self, **request):
        line = {"type": "control_request", "request_id": "1", "request": request}
        return self.ask(line, "control_response")["response"]

    def close(self):
        self.process.communicate()

def questions(request):
    """Return the last text of each user message."""
    contents = [message["content"] for message in request["messages"]
                if message["role"] == "user"]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]

def run(version):
    """Four turns, five control requests, one more turn."""
    requests.clear()
    claude, ids = Claude(version), [str(uuid.uuid4()) for _ in range(4)]
    for number, own_id in enumerate(ids):
        claude.turn(f"question {number}", own_id)
    seen = []
    for name, request in (
            ("unknown control request", {"subtype": "no_such_request"}),
            ("unknown uuid", {"target_message_uuid": str(uuid.uuid4())}),
            ("question 1", {"target_message_uuid": ids[1]}),
            ("question 3, the last", {"target_message_uuid": ids[3]}),
            ("question 1, question 2 is the last seen", {
                "target_message_uuid": ids[1], "last_seen_user_message_uuid": ids[2]})):
        response = claude.control(**{"subtype": "rewind_conversation", **request})
        body = response.get("response", {})
        seen.append((response["subtype"], body.get("rewound"), body.get("error"),
                     body.get("reason")))
        print(f"    {name}: {response['subtype']}", json.dumps(
            {key: body[key] for key in ("rewound", "error", "reason") if key in body}))
    claude.turn("next", str(uuid.uuid4()))
    claude.close()
    print("    user messages of the next request:", questions(requests[-1]))
    return seen, questions(requests[-1])

def refusal(sentence, reason):
    return "success", False, sentence, reason

as_before = True
done, failed = ("success", True, None, None), ("error", None, None, None)
print("2.1.332")
as_before &= run("2.1.332") == (
    [failed, refusal("target not found", "target_not_found"),
     refusal("stale target", "stale_target"), done, done],
    ["question 0", "next"])
print("2.1.197")
as_before &= run("2.1.197") == (
    [failed, refusal("target not found", None), refusal("stale target", None), done,
     refusal("stale target", None)],
    ["question 0", "question 1", "question 2", "next"])
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
