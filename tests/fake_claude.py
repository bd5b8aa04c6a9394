"""A fake `claude` for speed and for faults that the real one cannot be made to have.

The prompt says what happens (see `Fake.act`); everything a well-behaved answer consists of was seen on the real CLI
(2.1.330). conftest's `fake_claude` writes an executable that calls `main` with a folder for its log and sessions.
"""
from __future__ import annotations

import os
import sys
import time
from select import select

TYPE_CHECKING = False                   # typing's own would import it
if TYPE_CHECKING:                       # the fake is started hundreds of times: what one start does not need is imported where it is used
    from pathlib import Path
    from typing import Any, Dict, List, Mapping, Optional

try:
    from fake_json import dumps, loads
except ImportError:                     # another Python than the usual one
    from json import dumps, loads

FLAGS = ("--tools --setting-sources --strict-mcp-config --input-format --permission-mode --resume --session-id "
         "--include-partial-messages --disable-slash-commands --no-session-persistence --agent --system-prompt-snapshot --restricted")


def main(folder: str, version: str = "2.1.330 (Claude Code)", flags: str = FLAGS, auth: Optional[Mapping[str, Any]] = None,
         has_auth: bool = True) -> int:
    """folder: where the fake notes what it was told; auth: what `auth status` prints (default: signed in)."""
    words = sys.argv[1:]
    with open(os.path.join(folder, "starts.jsonl"), "ab", 0) as log:      # in one piece, since others may write, too
        log.write((dumps({"pid": os.getpid(), "argv": words, "env": dict(os.environ), "cwd": os.getcwd()}) + "\n").encode())
    if "--version" in words:
        print(version)
    elif "--help" in words:
        print(("  auth    Manage authentication\n" if has_auth else "") + "\n".join("  " + flag for flag in flags.split()))
    elif words[-2:] == ["auth", "status"]:
        status = {"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"} if auth is None else auth
        print(dumps(status))
        return 0 if status.get("loggedIn") else 1
    else:
        return Fake(folder, words).run()
    return 0


class Fake:
    """One process in stream-json mode."""

    def __init__(self, folder: str, words: List[str]) -> None:
        self.folder = folder
        self.turns: List[List[str]] = []                 # [role, text]
        self.said: List[str] = []
        self.setup: Dict[str, Any] = {}
        self.waiting: List[Dict[str, Any]] = []          # lines that came while an answer was waited for
        self.client_tools: List[Dict[str, Any]] = []        # the client's tools
        self.last_was_error = False
        self.session = "%s-%s-%s-%s-%s" % tuple(os.urandom(size).hex() for size in (4, 2, 2, 2, 6))
        self.keeps = "--no-session-persistence" not in words
        self.resumes = None
        for word in words:
            if word.startswith("--session-id="):
                self.session = word.partition("=")[2]
            if word.startswith("--resume="):
                self.session = self.resumes = word.partition("=")[2]

    def run(self) -> int:
        if self.resumes:
            if not os.path.exists(self.kept):
                self.say(type="result", subtype="error_during_execution", is_error=True, num_turns=0, session_id=self.session,
                         errors=["No conversation found with session ID: " + self.session])
                return 1
            with open(self.kept, "rb") as file:
                self.turns = loads(file.read())
        while True:
            line = self.waiting.pop(0) if self.waiting else self.read()
            if line is None:
                break
            if line["type"] == "control_request":
                self.control(line)
            elif line["type"] == "assistant":
                self.turns.append(["assistant", text_of(line)])
            elif line["type"] == "user":
                text = text_of(line)
                self.turns.append(["user", text])
                if line.get("shouldQuery") is False:
                    self.result("", num_turns=0)
                else:
                    self.act(text)
        return 1 if self.last_was_error else 0

    def read(self) -> Optional[Dict[str, Any]]:
        """The next line, or None at the end of the input."""
        raw = sys.stdin.buffer.readline()
        if not raw:
            return None
        line: Dict[str, Any] = loads(raw)
        self.note(line)
        return line

    def ask(self, method: str, **params: Any) -> Dict[str, Any]:
        """Sends a request to the server of the client's tools, and waits for its answer. -> its result."""
        self.asked = getattr(self, "asked", -1) + 1
        request_id = "mcp-%d" % self.asked
        self.say(type="control_request", request_id=request_id, request={"subtype": "mcp_message", "server_name": "api", "message": {
            "jsonrpc": "2.0", "id": self.asked, "method": method, "params": params}})
        while True:
            line = self.read()
            if line is None:
                sys.exit(0)
            if line["type"] == "control_response" and line["response"]["request_id"] == request_id:
                answer: Dict[str, Any] = line["response"]["response"]["mcp_response"]
                assert (answer["jsonrpc"], answer["id"]) == ("2.0", self.asked), answer
                return dict(answer["result"])
            if line["type"] == "control_request" and line["request"]["subtype"] == "interrupt":
                self.control(line)
                sys.exit(0)
            self.waiting.append(line)

    def note(self, line: Mapping[str, Any]) -> None:
        with open(os.path.join(self.folder, "lines.jsonl"), "ab", 0) as log:
            log.write((dumps({"pid": os.getpid(), "line": line}) + "\n").encode())

    def say(self, **message: Any) -> None:
        sys.stdout.buffer.write(dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()

    def control(self, line: Mapping[str, Any]) -> None:
        request = line["request"]
        if request["subtype"] == "initialize":
            self.setup = request
        response: Dict[str, Any] = {"subtype": "success", "request_id": line["request_id"], "response": {"models": MODELS}}
        if request.get("systemPrompt") == "refuse this":
            response = {"subtype": "error", "request_id": line["request_id"], "error": "systemPrompt refused"}
        self.say(type="control_response", response=response)
        if request.get("sdkMcpServers"):
            self.ask("initialize", protocolVersion="2025-11-25", capabilities={})
            self.client_tools = self.ask("tools/list")["tools"]
        if request["subtype"] == "interrupt":
            self.say(type="result", subtype="error_during_execution", is_error=True, terminal_reason="aborted_streaming")

    def begin(self, source: str = "none") -> None:
        model = self.setup.get("agents", {}).get("bridge", {}).get("model") or "default-model"
        self.say(type="system", subtype="init", session_id=self.session, apiKeySource=source, model="resolved-" + model,
                 tools=["mcp__api__" + each["name"] for each in self.client_tools])
        self.say(type="system", subtype="status", status="requesting")
        self.say(type="stream_event", event={"type": "message_start", "message": {"id": "msg_1", "usage": {
            "input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}}}, parent_tool_use_id=None)

    def delta(self, text: str) -> None:
        self.say(type="stream_event", event={"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
                 parent_tool_use_id=None)

    def result(self, text: str, **fields: Any) -> None:
        self.last_was_error = bool(fields.get("is_error"))
        self.say(**{"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": text, "session_id": self.session,
                    "total_cost_usd": 0.001 * len(self.turns), "usage": {"input_tokens": 10, "output_tokens": 7,
                                                                        "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}, **fields})

    def answer(self, text: str) -> None:
        """A good answer, in two deltas."""
        self.delta(text[:len(text) // 2])
        self.delta(text[len(text) // 2:])
        self.say(type="assistant", message={"role": "assistant", "content": [{"type": "text", "text": text}]}, parent_tool_use_id=None)
        self.turns.append(["assistant", text])
        if self.keeps:
            with open(self.kept, "w") as file:
                file.write(dumps(self.turns))
        fields = {"structured_output": {"answer": text}} if "jsonSchema" in self.setup else {}
        self.result(text, **fields)

    @property
    def kept(self) -> str:
        """The file of the session."""
        return os.path.join(self.folder, "session-%s.json" % self.session)

    def _transcript(self) -> Path:
        from pathlib import Path                         # not for an ordinary answer: it takes as long as all else in a start
        return Path(self.kept)

    def act(self, text: str) -> None:
        """Does what the prompt says: `WORD rest`; any other prompt is echoed."""
        word, _, rest = text.partition(" ")
        action = getattr(self, "act_" + word.replace("-", "_"), None)
        if word == "die-early":
            return self.act_die_early(rest)
        self.said = []
        self.begin("ANTHROPIC_API_KEY" if word == "apikey" else "none")
        if action:
            action(rest)
        else:
            self.answer("Echo: " + text)

    def act_say(self, rest: str) -> None:
        self.answer(rest)

    def act_turns(self, rest: str) -> None:
        """Answers with all it remembers, as JSON."""
        self.answer(dumps(self.turns[:-1]))

    def act_hold(self, rest: str) -> None:
        """Says one word, then waits (at most 30 s) until the file `rest` exists, then answers "held"; leaves when it is interrupted."""
        self.delta("he")
        self.wait(rest)
        self.answer("held")

    def wait(self, path: str) -> None:
        """Until the file exists, at most 30 s; an interruption meanwhile ends the process."""
        until, inputs = time.monotonic() + 30, [0]
        while not os.path.exists(path) and time.monotonic() < until:
            if not select(inputs, [], [], 0.005)[0]:
                continue
            line = self.read()
            if line is None:
                inputs = []                              # the input has ended, and the bridge may be gone: no reason to leave
            elif line["type"] == "control_request" and line["request"]["subtype"] == "interrupt":
                self.control(line)
                sys.exit(1)
            else:
                self.waiting.append(line)

    def act_hang(self, rest: str) -> None:
        """Never answers, and leaves at SIGTERM or SIGINT only (or after 60 s)."""
        self.delta("thinking")
        time.sleep(60)
        os._exit(3)

    def act_stubborn(self, rest: str) -> None:
        """Never answers and ignores SIGINT and SIGTERM."""
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.delta("no")
        time.sleep(60)                                   # no second word: it would die of it where the bridge was killed meanwhile
        os._exit(3)

    def act_chatty(self, rest: str) -> None:
        """Never answers, but shows signs of life (at most 60 s)."""
        for _ in range(1200):
            self.say(type="system", subtype="api_retry", attempt=1)
            time.sleep(0.05)

    def act_tool(self, rest: str) -> None:
        """Runs a silent tool until the file `rest` exists, deaf meanwhile, then answers."""
        self.say(type="assistant", message={"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}]},
                 parent_tool_use_id=None)
        wait_for_file(rest)
        self.say(type="user", message={"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]})
        self.say(type="stream_event", event={"type": "message_start", "message": {}}, parent_tool_use_id=None)
        self.answer("done")

    def act_call(self, rest: str) -> None:
        """call JSON: says "Let me see." and calls the client's tools in the list of [name, input], one after the other as the real one does;
        answers with their results as JSON. With "deaf" as the first of the list, the process dies when the first result comes."""
        calls = loads(rest)
        is_deaf = calls[0] == "deaf" and bool(calls.pop(0))
        blocks = [{"type": "text", "text": "Let me see."}] + [
            {"type": "tool_use", "id": "toolu_%d" % n, "name": "mcp__api__" + name, "input": given} for n, (name, given) in enumerate(calls)]
        self.delta("Let me see.")
        for block in blocks:
            self.say(type="assistant", message={"id": "msg_1", "role": "assistant", "content": [block], "stop_reason": None},
                     parent_tool_use_id=None)
        self.say(type="stream_event", event={"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}},
                 parent_tool_use_id=None)
        self.say(type="stream_event", event={"type": "message_stop"}, parent_tool_use_id=None)
        results = []
        for n, (name, given) in enumerate(calls):
            results.append(self.ask("tools/call", name=name, arguments=given, _meta={"claudecode/toolUseId": "toolu_%d" % n}))
            if is_deaf:
                os._exit(3)
        self.say(type="stream_event", event={"type": "message_start", "message": {"id": "msg_2", "usage": {
            "input_tokens": 10, "output_tokens": 1}}}, parent_tool_use_id=None)
        self.answer(dumps(results))

    def act_grandchild(self, rest: str) -> None:
        """Starts a process in a session of its own, notes its pid in the file `rest`, and hangs."""
        import subprocess
        code = "import time; time.sleep(60)"
        started = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdin=subprocess.DEVNULL)
        with open(rest + ".part", "w") as file:
            file.write(str(started.pid))
        os.replace(rest + ".part", rest)
        self.act_hang(rest)

    def act_die(self, rest: str) -> None:
        """die CODE WORDS: exits during the turn, with words on stderr."""
        code, _, words = rest.partition(" ")
        self.delta("dying")
        sys.stderr.write(words + "\n")
        sys.stderr.flush()
        os._exit(int(code))

    def act_die_early(self, rest: str) -> None:
        """Exits before anything was said."""
        sys.stderr.write("gone at once\n")
        sys.stderr.flush()
        os._exit(int(rest or 1))

    def act_garbage(self, rest: str) -> None:
        sys.stdout.buffer.write(b'{"type": "assis\n')
        sys.stdout.buffer.flush()
        self.answer("too late")

    def act_noise(self, rest: str) -> None:
        """Debug output, blank lines, CRLF, unknown types and a question of its own; then an answer."""
        sys.stdout.buffer.write(b"[DEBUG] hello\n\n   \r\n" + dumps({"type": "conversation_reset"}).encode() + b"\r\n")
        sys.stdout.buffer.flush()
        self.say(type="control_request", request_id="q", request={"subtype": "can_use_tool"})
        self.answer("quiet " + rest)

    def act_flood(self, rest: str) -> None:
        """`rest` MiB of text in deltas of 64 KiB, then a result with all of it."""
        total = int(rest) << 20
        for _ in range(total >> 16):
            self.delta("x" * (1 << 16))
        self.result("x" * total)

    def act_line(self, rest: str) -> None:
        """One line of `rest` MiB that never ends well."""
        piece = b"x" * (1 << 20)
        sys.stdout.buffer.write(b"{")
        for _ in range(int(rest)):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        time.sleep(60)

    def act_big(self, rest: str) -> None:
        """An answer of `rest` KiB."""
        self.answer("é" * (int(rest) << 9))

    def act_error(self, rest: str) -> None:
        """error JSON: a result with these fields; `said` goes into an assistant line before it."""
        fields = loads(rest)
        said = fields.pop("said", None)
        if said:
            self.say(type="assistant", message={"role": "assistant", "model": "<synthetic>", "content": []}, error=said)
        self.result(fields.pop("result", ""), **{"is_error": True, **fields})

    def act_script(self, rest: str) -> None:
        """script JSON: does the steps of a list, to its end or to the first `result` or `fail`:
        {"delta": TEXT} {"message": true} {"wait": FILE} {"pause": SECONDS} {"limits": rate_limit_info} {"retry": error_status}
        {"result": TEXT} {"fail": fields of a result, and `said`} {"first": FILE, "do": steps}, which is done once: it makes the file.
        Without a result at the end, the deltas since the last `message` are the answer."""
        if not self.steps(loads(rest)):
            self.result("".join(self.said))

    def steps(self, steps: List[Dict[str, Any]]) -> bool:
        """-> whether a result was said."""
        for step in steps:
            if "delta" in step:
                self.said.append(step["delta"])
                self.delta(step["delta"])
            elif "message" in step:
                self.said.clear()
                self.say(type="stream_event", event={"type": "message_start", "message": {}}, parent_tool_use_id=None)
            elif "wait" in step:
                self.wait(step["wait"])
            elif "pause" in step:
                time.sleep(step["pause"])
            elif "retry" in step:
                self.say(type="system", subtype="api_retry", attempt=1, max_retries=4, retry_delay_ms=545.5, error_status=step["retry"],
                         error="rate_limit" if step["retry"] == 429 else "server_error")
            elif "limits" in step:
                self.say(type="rate_limit_event", rate_limit_info=step["limits"])
            elif "first" in step:
                if not os.path.exists(step["first"]):
                    with open(step["first"], "w"):
                        pass
                    if self.steps(step["do"]):
                        return True
            elif "result" in step:
                self.result(step["result"])
                return True
            elif "fail" in step:
                self.act_error(dumps(step["fail"]))
                return True
        return False

    def act_apikey(self, rest: str) -> None:
        """An answer that an API key pays for."""
        self.answer("this was billed")

    def act_env(self, rest: str) -> None:
        self.answer(dumps(dict(os.environ)))


MODELS = [{"value": "default", "resolvedModel": "claude-sonnet-5", "displayName": "Default (recommended)"},
          {"value": "haiku", "resolvedModel": "claude-haiku-4-5", "displayName": "Haiku"}]


def text_of(line: Mapping[str, Any]) -> str:
    """The last text of a message, else a word for what it holds."""
    content = line["message"]["content"]
    return str(([block["text"] for block in content if block["type"] == "text"] or [content[-1]["type"]])[-1])


def wait_for_file(path: str) -> None:
    until = time.monotonic() + 30
    while not os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.005)
