#!/usr/bin/env bash
# Pydantic's schema of a tagged union or a tuple switches Claude Code's structured output off.
#
# Expected: a keyword that a JSON Schema validator does not know changes nothing (the standard
#   says so), and a schema that cannot be used is refused in the same way wherever it is given.
# Happens: Pydantic adds "discriminator" (from OpenAPI) to a tagged union, and writes a tuple as
#   "prefixItems". Claude Code compiles schemas in a strict mode in which an unknown keyword is
#   an error. Over --json-schema it says so and exits with 1. Over the stream-json protocol the
#   same schema in the control request `initialize` is answered with success, and then it is
#   dropped: the model is not offered StructuredOutput, the turn succeeds with free text, and
#   the result has no structured_output. The same union without its tag works, and so does the
#   tagged one when the one keyword is taken out. ("$schema" plays no part: Pydantic writes none.)
# Versions: @anthropic-ai/claude-code 2.1.332 (npm), pydantic 2.14.4 (PyPI; Python 3.10 or
#   newer). Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
python3 -m venv python
python/bin/pip install --quiet --disable-pip-version-check pydantic==2.14.4
cat >check.py <<'PY'
import copy, http.server, json, os, subprocess, sys, threading
from typing import Annotated, Literal, Union

from pydantic import BaseModel, Field

class Cat(BaseModel):
    kind: Literal["cat"]

class Dog(BaseModel):
    kind: Literal["dog"]

class PlainUnion(BaseModel):
    value: Union[Cat, Dog]

class TaggedUnion(BaseModel):
    value: Annotated[Union[Cat, Dog], Field(discriminator="kind")]

class Tuple(BaseModel):
    value: tuple[int, int]

class Api(http.server.BaseHTTPRequestHandler):
    """Answers by StructuredOutput where the request offers it, else in words."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        offered = "StructuredOutput" in [tool["name"] for tool in request.get("tools", ())]
        answer = json.dumps({"value": {"kind": "cat"}})
        block = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": "a cat"}
        if offered:
            block = {"type": "tool_use", "id": "toolu_1", "name": "StructuredOutput", "input": {}}
            delta = {"type": "input_json_delta", "partial_json": answer}
        stop = {"stop_reason": "tool_use" if offered else "end_turn"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for kind, rest in (
                ("message_start", {"message": {
                    "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
                    "content": [], "stop_reason": None,
                    "usage": {"input_tokens": 1, "output_tokens": 1}}}),
                ("content_block_start", {"index": 0, "content_block": block}),
                ("content_block_delta", {"index": 0, "delta": delta}),
                ("content_block_stop", {"index": 0}),
                ("message_delta", {"delta": stop, "usage": {"output_tokens": 2}}),
                ("message_stop", {})):
            event = json.dumps({"type": kind, **rest})
            self.wfile.write(f"event: {kind}\ndata: {event}\n\n".encode())

api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
os.environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{api.server_port}"

def run(*lines, options=()):
    return subprocess.run(
        ["node_modules/.bin/claude", "-p", "--verbose", "--input-format=stream-json",
         "--output-format=stream-json", "--tools=", "--no-session-persistence", *options],
        input="".join(json.dumps(line) + "\n" for line in lines), capture_output=True, text=True,
        timeout=60)

def outcome(schema):
    """What comes of a schema: over `initialize`, then over the flag."""
    prompt = {"type": "user", "message": {"role": "user", "content": "name an animal"}}
    request = {"subtype": "initialize", "jsonSchema": schema}
    done = run({"type": "control_request", "request_id": "1", "request": request}, prompt)
    lines = {line["type"]: line for line in map(json.loads, done.stdout.splitlines())}
    result, flag = lines["result"], run(prompt, options=["--json-schema", json.dumps(schema)])
    return (lines["control_response"]["response"]["subtype"], result["subtype"],
            result.get("structured_output"), flag.returncode, flag.stderr.strip())

tagged = TaggedUnion.model_json_schema()
freed = copy.deepcopy(tagged)
del freed["properties"]["value"]["discriminator"]
cat = {"value": {"kind": "cat"}}
refusal = 'Error: --json-schema is not a valid JSON Schema: strict mode: unknown keyword: "{}"'
as_before = True
for name, schema, expected in (
        ("union", PlainUnion.model_json_schema(), (cat, 0, "")),
        ("tagged union", tagged, (None, 1, refusal.format("discriminator"))),
        ("the same without discriminator", freed, (cat, 0, "")),
        ("tuple", Tuple.model_json_schema(), (None, 1, refusal.format("prefixItems")))):
    seen = outcome(schema)
    print(f"{name}: initialize {seen[0]}, turn {seen[1]}, structured_output {seen[2]};",
          f"--json-schema exits with {seen[3]} {seen[4]}")
    as_before &= seen == ("success", "success", *expected)
sys.exit(0 if as_before else 1)
PY
node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 python/bin/python check.py
