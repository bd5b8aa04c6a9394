#!/usr/bin/env bash
# Claude Code keeps an environment variable of the flag settings after these have lost it.
#
# Expected: in `claude -p` with stream-json input and output, the control request
#   apply_flag_settings with {"env": {NAME: VALUE}} sets a variable for a running process. The
#   types of the official SDK say that a later object replaces the former one of the same key,
#   and that null clears the key from the flag settings and falls back to the sources below
#   them. So after {"env": {}}, {"env": null} or an env without the name it is no longer set.
# Happens: CLAUDE_CODE_EXTRA_BODY, a JSON text that is merged into the body of the requests to
#   the API, takes effect with the next turn, as it should. Each of the three requests above is
#   answered with success, and get_settings no longer shows the variable. But both turns that
#   were tried after it have the old value in the body. The same with
#   CLAUDE_CODE_MAX_OUTPUT_TOKENS and {"env": {}} or {"env": null}. What ended it
#   was another value of the same name: "" for both, and for the first "{}" or null, which
#   get_settings shows as the text "null". So a program that uses a process again has to name
#   each variable that it has set before.
#   A value of CLAUDE_CODE_EXTRA_BODY that is no JSON, or JSON but no object, is answered with
#   success, too. The turn runs as without the variable, its output has the same kinds of lines,
#   and there is nothing on stderr.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-29. The types are those of the official SDK 0.3.332.
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
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ask(self, line, kind):
        """Send a line and return the lines up to the next one of this kind."""
        print(json.dumps(line), file=self.process.stdin, flush=True)
        answers = []
        for answer in map(json.loads, self.process.stdout):
            answers.append(answer)
            if answer["type"] == kind:
                return answers
        raise EOFError(self.process.stderr.read())

    def control(self, **request):
        line = {"type": "control_request", "request_id": "1", "request": request}
        return self.ask(line, "control_response")[-1]["response"]

    def apply(self, settings):
        """Apply flag settings: what is answered, and the env that get_settings shows then."""
        answer = self.control(subtype="apply_flag_settings", settings=settings)
        shown = self.control(subtype="get_settings")["response"]["effective"].get("env")
        return answer["subtype"], shown or {}

    def turn(self):
        """Ask: the max_tokens of the request, its other fields, and what the caller gets."""
        lines = self.ask({"type": "user", "message": {"role": "user", "content": "Hi."}}, "result")
        tokens = requests[-1].pop("max_tokens")
        kinds = [(line["type"], line.get("subtype"), line.get("is_error")) for line in lines]
        return tokens, sorted(requests[-1]), kinds

def run(version, before, after):
    """Apply two settings, one after the other, with turns before, between and after them."""
    requests.clear()
    claude = Claude(version)
    claude.control(subtype="initialize")
    turns = [claude.turn()]
    answers = [claude.apply(before)]
    turns.append(claude.turn())
    answers.append(claude.apply(after))
    turns += [claude.turn(), claude.turn()]
    claude.process.stdin.close()
    # The output after the last result would be a hint, too.
    rest, errors = claude.process.stdout.read(), claude.process.stderr.read()
    claude.process.wait()
    tokens, others, kinds = zip(*turns)
    is_quiet = all(kind == kinds[0] for kind in kinds) and not rest and not errors
    is_success = all(("result", "success", False) in kind for kind in kinds)
    has_same_fields = all(other == others[0] for other in others)
    return tokens, answers, is_success, is_quiet, has_same_fields

BODY, TOKENS = "CLAUDE_CODE_EXTRA_BODY", "CLAUDE_CODE_MAX_OUTPUT_TOKENS"
OTHER = {"SOME_OTHER_NAME": "1"}
# The variable and its first value; the later settings; whether the first value stays.
cases = [
    *((BODY, '{"max_tokens": 77}', {"env": env}, stays) for env, stays in (
        ({}, True), (None, True), (OTHER, True), ({BODY: ""}, False), ({BODY: "{}"}, False),
        ({BODY: None}, False), ({BODY: "{max_tokens: 77"}, False), ({BODY: "[77]"}, False))),
    *((TOKENS, "77", {"env": env}, stays) for env, stays in (
        ({}, True), (None, True), ({TOKENS: ""}, False)))]
as_before = True
for version in "2.1.332", "2.1.197":
    for name, value, after, stays in cases:
        before = {"env": {name: value}}
        tokens, answers, is_success, is_quiet, has_same_fields = run(version, before, after)
        print(f"{version}, {name} set to {value}, then {json.dumps(after)}:")
        print("    max_tokens {}, set {}, later {} and {};".format(*tokens),
              "it STAYS" if tokens[2:] == (77, 77) else "it has ended")
        print("    answers {} and {}; get_settings shows at last".format(
            *(answer for answer, _ in answers)), json.dumps(answers[1][1]))
        print(f"    only successes: {is_success}, no new kind of output: {is_quiet},",
              f"same other fields: {has_same_fields}")
        usual = tokens[0]
        shown = {key: "null" if text is None else text
                 for key, text in (after["env"] or {}).items()}
        as_before &= usual != 77 and is_success and is_quiet and has_same_fields
        as_before &= tokens[1:] == ((77, 77, 77) if stays else (77, usual, usual))
        as_before &= answers == [("success", before["env"]), ("success", shown)]
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
