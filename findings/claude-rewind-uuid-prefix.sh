#!/usr/bin/env bash
# Claude Code's rewind_conversation mixes up messages whose uuids begin alike.
#
# Expected: the control request rewind_conversation removes the user line with the given uuid
#   and all that follows. The caller chooses the uuids of its user lines; serial ones, which
#   differ in the last group only, are valid and unique.
# Happens: only the first 24 characters of the uuids are compared (all but the last group), and
#   the first message that fits is taken. With serial uuids 2.1.332 goes back to the FIRST
#   message, whichever was asked for, and reports "rewound": true: the whole conversation is
#   gone. Only "targetMessageUuid" in the answer shows that it is another one. It does so where
#   it refuses other uuids ("stale target"), and last_seen_user_message_uuid does not prevent it.
#   2.1.197 compares in the same way, and so refuses even the last message, which it accepts
#   otherwise. With the counter in an earlier group the same uuids work in both versions.
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

def run(version, ids, target, last_seen):
    """Four turns, a rewind, one more turn: what the rewind answers, what the API is sent."""
    requests.clear()
    claude = Claude(version)
    for number, own_id in enumerate(ids):
        claude.turn(f"question {number}", own_id)
    request = {"subtype": "rewind_conversation", "target_message_uuid": ids[target]}
    if last_seen:
        request["last_seen_user_message_uuid"] = ids[-1]
    response = claude.control(**request)["response"]
    claude.turn("next", str(uuid.uuid4()))
    claude.close()
    taken = response.get("targetMessageUuid")
    return (response["rewound"], response.get("error"),
            None if taken is None else ids.index(taken), questions(requests[-1]))

def accepted(number):
    """The answer when all from question `number` on was removed."""
    return True, None, number, [f"question {kept}" for kept in range(number)] + ["next"]

stale = (False, "stale target", None, [f"question {kept}" for kept in range(4)] + ["next"])
earlier = [f"7d1c2b5e-9f04-4c3a-8a6{number}-52e0b1d4f7a3" for number in range(4)]
last = [f"7d1c2b5e-9f04-4c3a-8a60-{number}2e0b1d4f7a{number}" for number in range(4)]
as_before = True
for version, ids, target, last_seen, expected in (
        ("2.1.332", earlier, 2, False, stale),
        ("2.1.332", earlier, 2, True, accepted(2)),
        ("2.1.332", earlier, 3, False, accepted(3)),
        ("2.1.332", last, 2, False, accepted(0)),
        ("2.1.332", last, 2, True, accepted(0)),
        ("2.1.332", last, 3, False, accepted(0)),
        ("2.1.197", earlier, 3, False, accepted(3)),
        ("2.1.197", last, 3, False, stale)):
    seen = run(version, ids, target, last_seen)
    counter = "an earlier group" if ids is earlier else "the last group"
    seen_name = " with last_seen" if last_seen else ""
    print(f"{version}, counter in {counter}, target question {target}{seen_name}:")
    print(f"    rewound {seen[0]}, error {seen[1]}, targetMessageUuid of question {seen[2]},",
          f"next request: {seen[3]}")
    as_before &= seen == expected
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
