#!/usr/bin/env bash
# After an answer of several parts, Claude Code prints the last part as if it were the whole.
#
# Expected: an answer that reaches the output limit of the API (stop_reason "max_tokens") is
#   reported as cut, or, where `claude -p` has it continued, the result holds all of it.
# Happens: `claude -p` asks again by itself, up to three times, with a user message that the
#   caller did not write. The parts fit together without a gap, but standard output (and
#   "result" in JSON) holds the last one only, with stop_reason "end_turn", is_error false and
#   exit status 0, while "usage" is the sum of all requests. num_turns counts the parts in
#   2.1.332 and is 1 in 2.1.197, where a stream shows no line for the hidden message either.
#   When the fourth part is cut, too, the result is an error sentence and the exit status 1,
#   although all text of the four parts was streamed. So a program has to join the text deltas.
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

requests, parts = [], []

class Api(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next part. A part that ends in a comma is cut."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        text = parts[len(requests) - 1]
        stop = {"stop_reason": "max_tokens" if text.endswith(",") else "end_turn"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for kind, rest in (
                ("message_start", {"message": {
                    "id": f"msg_{len(requests)}", "type": "message", "role": "assistant",
                    "model": "m", "content": [], "stop_reason": None,
                    "usage": {"input_tokens": 10, "output_tokens": 1}}}),
                ("content_block_start", {
                    "index": 0, "content_block": {"type": "text", "text": ""}}),
                ("content_block_delta", {
                    "index": 0, "delta": {"type": "text_delta", "text": text}}),
                ("content_block_stop", {"index": 0}),
                ("message_delta", {"delta": stop, "usage": {"output_tokens": 7}}),
                ("message_stop", {})):
            event = json.dumps({"type": kind, **rest})
            self.wfile.write(f"event: {kind}\ndata: {event}\n\n".encode())

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
os.environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{api.server_port}"

def run(version, *options):
    requests.clear()
    return subprocess.run(
        [f"{version}/node_modules/.bin/claude", "-p", "count", "--tools=",
         "--no-session-persistence", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

def outcome(version):
    """What the caller gets of `parts`: on standard output, and from a stream."""
    printed = run(version).stdout
    done = run(version, "--verbose", "--output-format=stream-json", "--include-partial-messages")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    asked = [message["role"] for message in requests[-1]["messages"]].count("user")
    result = lines[-1]
    return {
        "requests": len(requests), "user messages in the last one": asked,
        "user lines in the stream": sum(line["type"] == "user" for line in lines),
        "streamed": "".join(event.get("delta", {}).get("text", "") for event in events),
        "printed": printed, "result": result["result"], "stop_reason": result["stop_reason"],
        "is_error": result["is_error"], "exit status": done.returncode,
        "num_turns": result["num_turns"], "output_tokens": result["usage"]["output_tokens"]}

as_before = True
for version in "2.1.332", "2.1.197":
    is_new = version == "2.1.332"
    for parts[:] in (
            ["one"],
            ["one,", " two"],
            ["one,", " two,", " three,", " four"],
            ["one,", " two,", " three,", " four,"]):
        seen, count, has_failed = outcome(version), len(parts), parts[-1].endswith(",")
        print(f"{version}, the API answers {parts}:")
        print(*(f"    {name}: {value!r}" for name, value in seen.items()), sep="\n")
        as_before &= seen["result"].startswith("API Error: " if has_failed else parts[-1])
        as_before &= seen == {
            "requests": count, "user messages in the last one": count,
            "user lines in the stream": count - 1 if is_new else 0,
            "streamed": "".join(parts), "printed": seen["result"] + "\n",
            "result": seen["result"] if has_failed else parts[-1],
            "stop_reason": "stop_sequence" if has_failed else "end_turn",
            "is_error": has_failed, "exit status": int(has_failed),
            "num_turns": count if is_new else 1, "output_tokens": 7 * count}
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
