#!/usr/bin/env bash
# `claude --resume FILE` reads the named transcript and writes the turn into another file.
#
# Expected: --resume takes, besides the session ID that --help names, the path of a transcript
#   (absolute, ending in .jsonl). The turn is appended to that file, and the next
#   `claude --resume FILE` goes on from it, as it does with an ID.
# Happens: the file is only read. The turn goes into SESSION_ID.jsonl in the same folder, which
#   is made if need be; the ID is the one inside the file, whatever the file is called. So with
#   a transcript that was copied under a name of its own, each call goes on from the same old
#   point: the model does not know of the turn before, with exit status 0. Nor does
#   `--resume SESSION_ID` find the new turns, although their results carry this ID: it reads the
#   original in the configuration folder. The second file holds all turns, as branches.
# Versions: @anthropic-ai/claude-code 2.1.332 and 2.1.197 (npm), Python 3.9 or newer.
#   Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --prefix 2.1.332 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.332
npm install --prefix 2.1.197 --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.197
cat >check.py <<'PY'
import http.server, json, os, pathlib, shutil, subprocess, sys, threading

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

def ask(version, prompt, *options):
    """Run one turn; return the session ID, and the user's texts that the API gets."""
    requests.clear()
    done = subprocess.run(
        [os.path.abspath(f"{version}/node_modules/.bin/claude"), "-p", prompt, "--tools=",
         "--output-format=json", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
    texts = []
    for message in requests[-1]["messages"]:
        if message["role"] == "user":
            content = message["content"]
            texts.append(content if isinstance(content, str) else content[-1]["text"])
    return json.loads(done.stdout)["session_id"], texts

def prompts(path):
    """Return the user's texts in a transcript."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    contents = [row["message"]["content"] for row in rows if row["type"] == "user"]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]

as_before = True
for version in "2.1.332", "2.1.197":
    home = pathlib.Path(version, "home").resolve()
    (home / "chats").mkdir(parents=True)
    os.environ["HOME"] = str(home)
    session, _ = ask(version, "one")
    (original,) = home.glob(f".claude/projects/*/{session}.jsonl")
    named, beside = home / "chats" / "mine.jsonl", home / "chats" / original.name
    shutil.copy(original, named)
    before = named.read_bytes()
    by_path = [ask(version, text, f"--resume={named}") for text in ("two", "three")]
    by_id = ask(version, "four", f"--resume={session}")
    print(version)
    for name, (told, texts) in (
            ("--resume=mine.jsonl, two", by_path[0]), ("--resume=mine.jsonl, three", by_path[1]),
            ("--resume=SESSION_ID, four", by_id)):
        same = "the same" if told == session else "another"
        print(f"    {name}: {same} session ID; the API gets {texts}")
    for path in sorted(home.glob("chats/*")):
        print("   ", path.name.replace(session, "SESSION_ID"), "holds", prompts(path))
    as_before &= (
        by_path == [(session, ["one", "two"]), (session, ["one", "three"])]
        and by_id == (session, ["one", "four"])
        and named.read_bytes() == before
        and sorted(home.glob("chats/*")) == sorted((named, beside))
        and prompts(beside) == ["one", "two", "three"]
        and prompts(original) == ["one", "four"])
sys.exit(0 if as_before else 1)
PY
2.1.332/node_modules/.bin/claude --version
2.1.197/node_modules/.bin/claude --version
env -i PATH="$PATH" HOME="$work" ANTHROPIC_API_KEY=none \
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 timeout 200 python3 check.py
