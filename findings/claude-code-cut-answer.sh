#!/usr/bin/env bash
# After a cut answer, Claude Code reports one half of it as the whole, and as a success.
#
# Expected: a streamed answer of the API breaks off without the event message_stop. The result
#   line of `claude -p --output-format stream-json` holds the whole answer, if the CLI gets the
#   rest of it, or reports an error.
# Happens: that is so before the end of the first content block. Both versions ask again from
#   the start. But the text deltas of the first try stay in the stream, and 2.1.197 writes no
#   line that tells of it. After the end of a block it is different, also of a block of thinking:
#   2.1.332 asks for the rest with a user message that the caller did not write. The result is
#   the rest alone, with stop_reason "end_turn", is_error false and exit status 0. The request
#   has the finished blocks only (none, if that is thinking), so the text of an unfinished one
#   comes twice in the deltas. The assistant lines, joined, have the whole text.
#   2.1.197 does not ask again. When the connection is lost, it reports an error, as it should.
#   When the HTTP response itself is complete, as from a gateway that has lost the connection
#   behind it, the result holds the finished blocks, which may be the empty string, with is_error
#   false and exit status 0. Only the stop_reason null tells that something is missing.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-29. The stand-in of the API goes on where the answer in the request ends.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --prefix 2.1.332 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
npm install --prefix 2.1.197 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.197
cat >check.py <<'PY'
import http.server, json, os, subprocess, sys, threading, time

WHOLE = "one two three four"
requests, first_blocks, is_lost = [], [], False

def texts(messages, role):
    """Return the texts of all messages of this role."""
    contents = [message["content"] for message in messages if message["role"] == role]
    return [block["text"] for content in contents
            for block in ([{"type": "text", "text": content}] if isinstance(content, str)
                          else content)
            if block["type"] == "text"]

class Api(http.server.BaseHTTPRequestHandler):
    """Sends `first_blocks` only, and from then on the part of WHOLE that a request lacks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def head(self, name, value, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header(name, value)
        self.end_headers()

    def say(self, kind, **rest):
        event = f"event: {kind}\ndata: {json.dumps({'type': kind, **rest})}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def block(self, index, kind, pieces, is_finished):
        self.say("content_block_start", index=index, content_block={
            "text": {"type": "text", "text": ""},
            "thinking": {"type": "thinking", "thinking": "", "signature": ""}}[kind])
        for piece in pieces:
            self.say("content_block_delta", index=index, delta={
                "type": f"{kind}_delta", kind: piece})
        if kind == "thinking":
            self.say("content_block_delta", index=index, delta={
                "type": "signature_delta", "signature": "c2lnbmVk"})
        if is_finished:
            self.say("content_block_stop", index=index)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        requests.append(request)
        missing = WHOLE[len("".join(texts(request["messages"], "assistant"))):]
        message = {
            "id": f"msg_{len(requests)}", "type": "message", "role": "assistant", "model": "m",
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 1}}
        if not request.get("stream"):
            message.update(content=[{"type": "text", "text": missing}], stop_reason="end_turn")
            answer = json.dumps(message).encode()
            self.head("content-length", str(len(answer)), "application/json")
            self.wfile.write(answer)
            return
        self.head("transfer-encoding", "chunked", "text/event-stream")
        self.say("message_start", message=message)
        if len(requests) == 1:
            for index, block in enumerate(first_blocks):
                self.block(index, *block)
            time.sleep(0.5)  # so that the CLI has read all of it
            self.close_connection = True
        else:
            self.block(0, "text", [missing], True)
            self.say("message_delta", delta={"stop_reason": "end_turn"},
                     usage={"output_tokens": 7})
            self.say("message_stop")
        if len(requests) > 1 or not is_lost:
            # The chunk that ends an HTTP response.
            self.wfile.write(b"0\r\n\r\n")

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
os.environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{api.server_port}"

def outcome(version):
    """What the API is asked after the cut, and what the caller gets."""
    requests.clear()
    question = {"type": "user", "message": {"role": "user", "content": "count"}}
    done = subprocess.run(
        [f"{version}/node_modules/.bin/claude", "-p", "--verbose", "--tools=",
         "--input-format=stream-json", "--output-format=stream-json",
         "--include-partial-messages", "--no-session-persistence"],
        input=json.dumps(question) + "\n", capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    kinds = [line["subtype"] if line["type"] == "system" else line["type"] for line in lines]
    # A line with "error" is no answer, but holds the sentence of the result.
    answers = [line["message"] for line in lines
               if line["type"] == "assistant" and "error" not in line]
    result, messages = lines[-1], requests[-1]["messages"]
    return {
        "requests": len(requests),
        "the question comes last": texts(messages, "user")[-1].strip() == "count",
        "answer in the last request": "".join(texts(messages, "assistant")),
        "lines about the cut": [kind for kind in kinds if kind in ("api_retry", "user")],
        "text deltas": "".join(event.get("delta", {}).get("text", "") for event in events),
        "assistant lines": "".join(texts(answers, "assistant")),
        "result": result["result"], "stop_reason": result["stop_reason"],
        "subtype": result["subtype"], "is_error": result["is_error"],
        "exit status": done.returncode}

def expected(requests, *values):
    """Return the outcome with these values, which are in its order from the second one on."""
    names = ("the question comes last", "answer in the last request", "lines about the cut",
             "text deltas", "assistant lines", "result", "stop_reason")
    seen = {"requests": requests, **dict(zip(names, values)), "subtype": "success"}
    has_failed = seen["result"] == FAILED
    return {**seen, "is_error": has_failed, "exit status": int(has_failed)}

HALF, REST, FAILED = "one two ", "three four", "API Error: "
# What arrives; what is seen with 2.1.332; the same with 2.1.197 after a complete response, and
# after a lost connection.
cases = {
    "a part of the first block": (
        [("text", ["one ", "two "], False)],
        expected(2, True, "", ["api_retry"], HALF + WHOLE, WHOLE, WHOLE, "end_turn"),
        expected(2, True, "", [], HALF, WHOLE, WHOLE, "end_turn"),
        expected(2, True, "", [], HALF, WHOLE, WHOLE, "end_turn")),
    "thinking and a part of the text": (
        [("thinking", ["hmm"], True), ("text", ["one ", "two "], False)],
        expected(2, False, "", ["user"], HALF + WHOLE, WHOLE, WHOLE, "end_turn"),
        expected(1, True, "", [], HALF, "", "", None),
        expected(1, True, "", [], HALF, "", FAILED, "stop_sequence")),
    "the first of two blocks of text": (
        [("text", ["one ", "two "], True)],
        expected(2, False, HALF, ["user"], WHOLE, WHOLE, REST, "end_turn"),
        expected(1, True, "", [], HALF, HALF, HALF, None),
        expected(1, True, "", [], HALF, HALF, FAILED, "stop_sequence")),
    "a block of text and a part of the second": (
        [("text", ["one ", "two "], True), ("text", ["three "], False)],
        expected(2, False, HALF, ["user"], HALF + "three " + REST, WHOLE, REST, "end_turn"),
        expected(1, True, "", [], HALF + "three ", HALF, HALF, None),
        expected(1, True, "", [], HALF + "three ", HALF, FAILED, "stop_sequence"))}
as_before = True
print(f"The whole answer is {WHOLE!r}.")
for version in "2.1.332", "2.1.197":
    for name, (first_blocks[:], new, old, old_lost) in cases.items():
        for is_lost in False, True:
            end = "the connection is lost" if is_lost else "the response ends"
            seen = outcome(version)
            print(f"{version}, {end} after {name}:")
            print(*(f"    {key}: {value!r}" for key, value in seen.items()), sep="\n")
            if seen["is_error"]:
                seen["result"] = seen["result"][:len(FAILED)]
            as_before &= seen == (
                new if version == "2.1.332" else old_lost if is_lost else old)
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
