#!/usr/bin/env bash
# The same history lines give Claude Code another conversation when they are written at once.
#
# Expected: `claude -p --input-format stream-json` reads one JSON line after the other. A user
#   line with "shouldQuery": false is appended to the conversation without a turn; an assistant
#   line is appended as an answer. So a program writes a history as user, assistant, user,
#   assistant, prompt, and the API gets the messages in this order.
# Happens: it does only if the program waits for a `result` line after each user line, although
#   no turn was asked for. Written at once, the user lines wait in a queue while the assistant
#   lines are taken: all answers stand before all questions. The questions are then joined with
#   the prompt to one user message, as if all of them were asked now. In 2.1.332 the request
#   even begins with the role "assistant". There is no error and no warning; num_turns of the
#   results is the same in both cases. The types of the official SDK do say that a line without
#   a turn is merged into the next prompt, but not that answers overtake it, nor that waiting
#   for a result keeps it apart.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-28.
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

HISTORY = (("user", "Is it late?"), ("assistant", "No."), ("user", "Is it cold?"),
           ("assistant", "Yes."))

def run(version, waits):
    """Write the history and a prompt; return num_turns of the results, and the messages."""
    requests.clear()
    claude = subprocess.Popen(
        [f"{version}/node_modules/.bin/claude", "-p", "--verbose", "--input-format=stream-json",
         "--output-format=stream-json", "--tools=", "--no-session-persistence"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answers = map(json.loads, claude.stdout)
    results = []
    for role, text in (*HISTORY, ("user", "Is it windy?")):
        line = {"type": role, "message": {
            "role": role, "content": [{"type": "text", "text": text}]}}
        if role == "user" and (role, text) in HISTORY:
            line["shouldQuery"] = False
        print(json.dumps(line), file=claude.stdin, flush=True)
        if waits and role == "user":
            results.append(next(answer for answer in answers if answer["type"] == "result"))
    claude.stdin.close()
    results += [answer for answer in answers if answer["type"] == "result"]
    claude.wait()
    (request,) = requests
    return [result["num_turns"] for result in results], messages(request)

def messages(request):
    """Return (role, texts) of each message, without what the CLI tells of date and folder."""
    kept = []
    for message in request["messages"]:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [block["text"] for block in content]
        texts = [text.strip() for text in texts if not text.startswith("<system-reminder>")]
        if message["role"] != "system" and texts:
            kept.append((message["role"], texts))
    return kept

in_order = [(role, [text]) for role, text in (*HISTORY, ("user", "Is it windy?"))]
questions = ("user", ["Is it late?", "Is it cold?", "Is it windy?"])
expected = {
    ("2.1.332", True): in_order,
    ("2.1.332", False): [("assistant", ["No."]), ("assistant", ["Yes."]), questions],
    ("2.1.197", True): in_order,
    ("2.1.197", False): [("assistant", ["No.", "Yes."]), questions]}
as_before = True
for (version, waits), wanted in expected.items():
    turns, seen = run(version, waits)
    way = "waits for each result" if waits else "writes all lines at once"
    print(f"{version}, the program {way}; num_turns of the results {turns}; the API gets:")
    for role, texts in seen:
        print(f"    {role}: {texts}")
    as_before &= seen == wanted and turns == [0, 0, 1]
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
