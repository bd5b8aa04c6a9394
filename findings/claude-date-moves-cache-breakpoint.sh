#!/usr/bin/env bash
# A replayed history keeps the prompt cache from matching: Claude Code puts the date behind it.
#
# Expected: a chat is continued in a new process of `claude -p --input-format stream-json`. The
#   earlier turns go in as user lines with "shouldQuery": false, each followed by an assistant
#   line. The request of a turn begins like the request of the turn before, up to the cache
#   breakpoint there, so the API reads the history from its prompt cache. This is what one
#   process that lives through all turns does, and what 2.1.197 does in both ways.
# Happens: 2.1.332 tells the date in a message of the role "system". One live process sends it
#   once, behind the first user message. A process with a replayed history sends it behind the
#   LAST user message, and the only breakpoint of the messages stands on it. The next process
#   has an answer at that place, so its request never begins with what the API was asked to
#   store. Only the system prompt can match; the history counts as new input in every turn.
#   2.1.197 tells the date in front of the first user message. The breakpoint is on the prompt.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-28. The stand-in of the API shows the requests; it has no cache itself.
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

class Claude:
    def __init__(self, version):
        self.process = subprocess.Popen(
            [f"{version}/node_modules/.bin/claude", "-p", "--verbose",
             "--input-format=stream-json", "--output-format=stream-json", "--tools=",
             "--no-session-persistence"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, kind, text, **fields):
        message = {"role": kind, "content": [{"type": "text", "text": text}]}
        line = {"type": kind, "message": message, **fields}
        print(json.dumps(line), file=self.process.stdin, flush=True)

    def turn(self, text, **fields):
        """Send a user line and wait for its result line."""
        self.send("user", text, **fields)
        any(json.loads(line)["type"] == "result" for line in self.process.stdout)

    def close(self):
        self.process.communicate()

def live(version, turns):
    """All turns in one process."""
    claude = Claude(version)
    for number in range(turns):
        claude.turn(f"question {number}")
    claude.close()

def fresh(version, turns):
    """Each turn in a process of its own, which is given the earlier ones."""
    for count in range(turns):
        claude = Claude(version)
        for number in range(count):
            claude.turn(f"question {number}", shouldQuery=False)
            claude.send("assistant", "fine")
        claude.turn(f"question {count}")
        claude.close()

def blocks(request):
    """Return (role, text, has a breakpoint) of each block; a string counts as one block."""
    return [(message["role"], block["text"], "cache_control" in block)
            for message in request["messages"]
            for block in (message["content"] if isinstance(message["content"], list)
                          else [{"text": message["content"]}])]

def pair(request, following):
    """Return the role at the breakpoint, how many blocks it covers, how many come again."""
    own, other = blocks(request), blocks(following)
    (end,) = [place for place, block in enumerate(own, 1) if block[2]]
    again = 0
    while again < end and own[again][:2] == other[again][:2]:
        again += 1
    return own[end - 1][0], end, again

in_order = [("user", 2, 2), ("user", 4, 4), ("user", 6, 6)]
expected = {
    ("2.1.332", live): [("system", 2, 2), *in_order[1:]],
    ("2.1.332", fresh): [("system", 2, 1), ("system", 5, 4), ("system", 7, 6)],
    ("2.1.197", live): in_order,
    ("2.1.197", fresh): in_order}
as_before = True
for (version, way), pairs in expected.items():
    requests.clear()
    way(version, 4)
    print(f"{version}, {way.__name__} process; [ ] is the breakpoint:")
    for request in requests:
        print("   ", *(f"[{role}: {text[:15]!r}]" if is_end else role
                       for role, text, is_end in blocks(request)))
    seen = [pair(*two) for two in zip(requests, requests[1:])]
    for number, (_, end, again) in enumerate(seen, 1):
        print(f"    request {number + 1} begins with {again} of the {end} blocks up to the",
              f"breakpoint of request {number}")
    systems = {json.dumps(request["system"]) for request in requests}
    as_before &= seen == pairs and len(requests) == 4 and len(systems) == 1
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
