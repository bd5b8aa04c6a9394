"""A fake `claude`: fast, and able to fail in ways that the real CLI cannot be made to fail.

The prompt selects what happens (see `Fake.act`). The lines of a normal answer are those of the
real CLI (2.1.330). conftest's `fake_claude` writes an executable that calls `main` with a folder
for the log and the sessions.

The tests start the fake hundreds of times. Modules that only one action needs are therefore
imported in that action.
"""

from __future__ import annotations

import os
import sys
import time
from select import select

# typing.TYPE_CHECKING would need the import of typing.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional

try:
    from fake_json import dumps, loads
except ImportError:
    # This Python lacks the internals that fake_json uses.
    from json import dumps, loads

FLAGS = (
    "--tools --setting-sources --strict-mcp-config --input-format --permission-mode --resume "
    "--session-id --include-partial-messages --disable-slash-commands --no-session-persistence "
    "--agent --system-prompt-snapshot --restricted"
)
# Answers the three questions of a start without Python.
PROBE_SCRIPT = """#!/bin/sh
case "$1" in
--version) echo "2.1.330 (Claude Code)"; exit ;;
--help) echo "  auth %s"; exit ;;
--setting-sources=) echo '{"loggedIn": true, "subscriptionType": "max"}'; exit ;;
esac
""" % FLAGS


def main(
    folder: str,
    version: str = "2.1.330 (Claude Code)",
    flags: str = FLAGS,
    auth: Optional[Mapping[str, Any]] = None,
    has_auth: bool = True,
) -> int:
    """Run the fake with the arguments in sys.argv; return the exit status.

    folder: of the logs `starts.jsonl` and `lines.jsonl`.
    auth: what `auth status` prints (default: logged in).
    """
    words = sys.argv[1:]
    start = {"pid": os.getpid(), "argv": words, "env": dict(os.environ), "cwd": os.getcwd()}
    # Unbuffered, so that the line is one write: other processes append to the same file.
    with open(os.path.join(folder, "starts.jsonl"), "ab", 0) as log:
        log.write((dumps(start) + "\n").encode())
    if "--version" in words:
        print(version)
    elif "--help" in words:
        commands = "  auth    Manage authentication\n" if has_auth else ""
        print(commands + "\n".join("  " + flag for flag in flags.split()))
    elif words[-2:] == ["auth", "status"]:
        status = auth
        if status is None:
            status = {"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"}
        print(dumps(status))
        return 0 if status.get("loggedIn") else 1
    else:
        return Fake(folder, words).run()
    return 0


class Fake:
    """A process in stream-json mode.

    turns: [role, text] of each turn.  lines: (uuid, number of the turn) of the user's lines.
    deltas, message_id: of the current message.
    setup: the `initialize` request.  backlog: lines that arrived during an action.
    """

    def __init__(self, folder: str, words: List[str]) -> None:
        self.folder = folder
        self.turns: List[List[str]] = []
        self.lines: List[Any] = []
        self.deltas: List[str] = []
        self.message_id: Optional[str] = None
        self.setup: Dict[str, Any] = {}
        self.backlog: List[Dict[str, Any]] = []
        self.client_tools: List[Dict[str, Any]] = []
        # The variables that were set, and how thoughts are shown.
        self.environ: Dict[str, str] = {}
        self.display: Optional[str] = None
        self.last_was_error = False
        self.call_count = 0
        self.session = "%s-%s-%s-%s-%s" % tuple(os.urandom(size).hex() for size in (4, 2, 2, 2, 6))
        self.is_persistent = "--no-session-persistence" not in words
        self.resumes = None
        for word in words:
            if word.startswith("--session-id="):
                self.session = word.partition("=")[2]
            if word.startswith("--resume="):
                self.session = self.resumes = word.partition("=")[2]

    def run(self) -> int:
        """Answer prompts to the end of the input; return the exit status."""
        if self.resumes and self.resumes.endswith(".jsonl"):
            self.read_transcript(self.resumes)
        elif self.resumes:
            if not os.path.exists(self.session_path):
                self.say(
                    type="result",
                    subtype="error_during_execution",
                    is_error=True,
                    num_turns=0,
                    session_id=self.session,
                    errors=["No conversation found with session ID: " + self.session],
                )
                return 1
            with open(self.session_path, "rb") as file:
                self.turns = loads(file.read())
        while True:
            line = self.backlog.pop(0) if self.backlog else self.read()
            if line is None:
                break
            if line["type"] == "control_request":
                self.control(line)
            elif "local_command_source" in line:
                self.turns.append(["user", line["local_command_source"]])
            elif line["type"] == "assistant":
                self.turns.append(["assistant", text_of(line)])
            elif line["type"] == "user":
                text = text_of(line)
                self.lines.append((line.get("uuid"), len(self.turns)))
                self.turns.append(["user", text])
                if line.get("shouldQuery") is False:
                    self.result("", num_turns=0)
                else:
                    self.act(text)
        return 1 if self.last_was_error else 0

    def read_transcript(self, path: str) -> None:
        """Take the turns from a file, which may be a named pipe; it is opened twice."""
        for _ in range(2):
            with open(path, "rb") as file:
                rows = [loads(line) for line in file]
        for row in rows:
            if row["type"] in ("user", "assistant") and not row.get("isVirtual"):
                self.turns.append([row["type"], text_of(row)])

    def read(self) -> Optional[Dict[str, Any]]:
        """Read and log the next line; return None at the end of the input."""
        raw = sys.stdin.buffer.readline()
        if not raw:
            return None
        line: Dict[str, Any] = loads(raw)
        self.note(line)
        return line

    def ask(self, method: str, **params: Any) -> Dict[str, Any]:
        """Send a request to the MCP server of the client's tools; return its result."""
        self.asked = getattr(self, "asked", -1) + 1
        request_id = "mcp-%d" % self.asked
        message = {"jsonrpc": "2.0", "id": self.asked, "method": method, "params": params}
        self.say(
            type="control_request",
            request_id=request_id,
            request={"subtype": "mcp_message", "server_name": "api", "message": message},
        )
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
            self.backlog.append(line)

    def note(self, line: Mapping[str, Any]) -> None:
        """Append a line of stdin to the log."""
        with open(os.path.join(self.folder, "lines.jsonl"), "ab", 0) as log:
            log.write((dumps({"pid": os.getpid(), "line": line}) + "\n").encode())

    def say(self, **message: Any) -> None:
        """Print a line."""
        sys.stdout.buffer.write(dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()

    def event(self, **event: Any) -> None:
        """Print a stream event of the main conversation."""
        if event["type"] == "message_start":
            self.message_id = event["message"].get("id")
        self.say(type="stream_event", event=event, parent_tool_use_id=None)

    def control(self, line: Mapping[str, Any]) -> None:
        """Answer a control request."""
        request, request_id = line["request"], line["request_id"]
        if request["subtype"] == "initialize":
            self.setup = request
        if request["subtype"] == "apply_flag_settings":
            self.environ.update(request["settings"].get("env", {}))
        if request["subtype"] == "set_max_thinking_tokens":
            self.display = request["thinking_display"]
        details: Dict[str, Any] = {"models": MODELS}
        if request["subtype"] == "rewind_conversation":
            details = {"rewound": self.rewind(request)}
            details["targetMessageUuid"] = request["target_message_uuid"]
        if request["subtype"] == "export_conversation":
            details = {"text": "\n".join("> " + text for role, text in self.turns)}
        if request.get("systemPrompt") == "refuse this":
            refusal = "systemPrompt refused"
            response = {"subtype": "error", "request_id": request_id, "error": refusal}
        else:
            response = {"subtype": "success", "request_id": request_id, "response": details}
        self.say(type="control_response", response=response)
        if request.get("sdkMcpServers"):
            self.ask("initialize", protocolVersion="2025-11-25", capabilities={})
            self.client_tools = self.ask("tools/list")["tools"]
        if request["subtype"] == "interrupt":
            self.say(
                type="result",
                subtype="error_during_execution",
                is_error=True,
                terminal_reason="aborted_streaming",
            )

    def rewind(self, request: Mapping[str, Any]) -> bool:
        """Take back a message and all after it; return whether that is possible."""
        ids = [line[0] for line in self.lines]
        target = request["target_message_uuid"]
        if target not in ids or request["last_seen_user_message_uuid"] != ids[-1]:
            return False
        number = ids.index(target)
        del self.turns[self.lines[number][1] :], self.lines[number:]
        return True

    def begin(self, source: str = "none") -> None:
        """Print the lines before the first delta. source: of the API key."""
        model = self.setup.get("agents", {}).get("bridge", {}).get("model") or "default-model"
        tools = ["mcp__api__" + tool["name"] for tool in self.client_tools]
        # A schema that its validator does not take is dropped.
        if "jsonSchema" in self.setup and "(" not in patterns_of(self.setup["jsonSchema"]):
            tools.append("StructuredOutput")
        self.say(
            type="system",
            subtype="init",
            session_id=self.session,
            apiKeySource=source,
            model="resolved-" + model,
            tools=tools,
        )
        self.say(type="system", subtype="status", status="requesting")
        self.event(type="message_start", message={"id": "msg_1", "usage": usage(1)})

    def delta(self, text: str) -> None:
        """Print a piece of the text."""
        delta = {"type": "text_delta", "text": text}
        self.event(type="content_block_delta", index=0, delta=delta)

    def block(self, index: int, block: Dict[str, Any], *deltas: Dict[str, Any]) -> None:
        """Print a block that is no text: its events, and its own line before the last of them."""
        empty = {"tool_use": {"input": {}}, "thinking": {"thinking": "", "signature": ""}}
        opened = {**block, **empty.get(block["type"], {})}
        self.event(type="content_block_start", index=index, content_block=opened)
        for delta in deltas:
            self.event(type="content_block_delta", index=index, delta=delta)
        message = {"id": "msg_1", "role": "assistant", "content": [block], "stop_reason": None}
        self.say(type="assistant", message=message, parent_tool_use_id=None)
        self.event(type="content_block_stop", index=index)

    def call_block(self, index: int, block: Dict[str, Any]) -> None:
        """Print a call of a tool, whose arguments come in pieces."""
        line = dumps(block["input"])
        pieces = ("", line[: len(line) // 2], line[len(line) // 2 :]) if block["input"] else ("",)
        self.block(
            index, block, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
        )

    def result(self, text: str, **fields: Any) -> None:
        """Print the result of a turn. fields: replace the fields of a success."""
        self.last_was_error = bool(fields.get("is_error"))
        success = {
            "type": "result",
            "subtype": "success",
            "is_error": False,
            "num_turns": 1,
            "result": text,
            "session_id": self.session,
            "total_cost_usd": 0.001 * len(self.turns),
            "usage": usage(7),
        }
        self.say(**{**success, **fields})

    def answer(self, text: str) -> None:
        """Print a successful answer, in two deltas. A limit ends it after so many words; then the
        process waits for an interrupt."""
        limit = self.environ.get("CLAUDE_CODE_MAX_OUTPUT_TOKENS")
        words = text.split(" ")
        if limit and len(words) > int(limit):
            self.end_at_limit(" ".join(words[: int(limit)]))
        self.delta(text[: len(text) // 2])
        self.delta(text[len(text) // 2 :])
        self.say(
            type="assistant",
            message={
                "id": self.message_id,
                "role": "assistant",
                "content": [{"type": "text", "text": text}],
            },
            parent_tool_use_id=None,
        )
        self.turns.append(["assistant", text])
        if self.is_persistent:
            self.save_turns()
        fields = {"structured_output": {"answer": text}} if "jsonSchema" in self.setup else {}
        self.result(text, **fields)

    def end_at_limit(self, text: str) -> None:
        """Print a part of an answer, and exit at the interrupt."""
        self.delta(text)
        block = {"type": "text", "text": text}
        message = {"id": self.message_id, "role": "assistant", "content": [block]}
        self.say(type="assistant", message=message, parent_tool_use_id=None)
        self.event(
            type="message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 3}
        )
        while True:
            line = self.read()
            if line is None or line.get("request", {}).get("subtype") == "interrupt":
                sys.exit(0)

    def save_turns(self) -> None:
        """Write the file of the session."""
        with open(self.session_path, "w") as file:
            file.write(dumps(self.turns))

    @property
    def session_path(self) -> str:
        """The file of the session."""
        return os.path.join(self.folder, "session-%s.json" % self.session)

    def act(self, text: str) -> None:
        """Run the action `WORD rest` of the prompt: `act_WORD(rest)`. Echo any other prompt."""
        word, _, rest = text.partition(" ")
        action = getattr(self, "act_" + word.replace("-", "_"), None)
        if word == "die-early":
            return self.act_die_early(rest)
        self.deltas = []
        self.begin("ANTHROPIC_API_KEY" if word == "apikey" else "none")
        if action:
            action(rest)
        else:
            self.answer("Echo: " + text)

    def act_say(self, rest: str) -> None:
        """Answer with `rest`."""
        self.answer(rest)

    def act_turns(self, rest: str) -> None:
        """Answer with all earlier turns, as JSON."""
        self.answer(dumps(self.turns[:-1]))

    def act_hold(self, rest: str) -> None:
        """Print one delta, wait until the file `rest` exists, then answer "held"."""
        self.delta("he")
        self.wait(rest)
        self.answer("held")

    def wait(self, path: str) -> None:
        """Wait until the file exists, at most 30 s. An interrupt ends the process."""
        deadline, is_open = time.monotonic() + 30, True
        while not os.path.exists(path) and time.monotonic() < deadline:
            if not is_open:
                time.sleep(0.005)
            if not is_open or not has_input(0.005):
                continue
            line = self.read()
            if line is None:
                # The input has ended, maybe because the bridge was killed. Keep waiting.
                is_open = False
            elif line["type"] == "control_request" and line["request"]["subtype"] == "interrupt":
                self.control(line)
                sys.exit(1)
            else:
                self.backlog.append(line)

    def act_hang(self, rest: str) -> None:
        """Never answer; exit only at SIGTERM or SIGINT (or after 60 s)."""
        self.delta("thinking")
        time.sleep(60)
        os._exit(3)

    def act_stubborn(self, rest: str) -> None:
        """Never answer, and ignore SIGINT and SIGTERM."""
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.delta("no")
        # Print nothing more: it would die of a broken pipe if the bridge was killed.
        time.sleep(60)
        os._exit(3)

    def act_chatty(self, rest: str) -> None:
        """Never answer, but print a line every 50 ms (at most 60 s)."""
        for _ in range(1200):
            self.say(type="system", subtype="api_retry", attempt=1)
            time.sleep(0.05)

    def act_tool(self, rest: str) -> None:
        """Run a tool until the file `rest` exists, without reading stdin; then answer."""
        block = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}
        message = {"role": "assistant", "content": [block]}
        self.say(type="assistant", message=message, parent_tool_use_id=None)
        wait_for_file(rest)
        block = {"type": "tool_result", "tool_use_id": "t", "content": "ok"}
        self.say(type="user", message={"role": "user", "content": [block]})
        self.event(type="message_start", message={})
        self.answer("done")

    def act_call(self, rest: str) -> None:
        """call JSON: call the client's tools, then answer with their results as JSON.

        JSON: a list of [name, input], or [name, input, id]; the calls follow one another, as those
        of the real CLI do.
        If the list starts with "deaf", the process dies at the first result.
        """
        calls = loads(rest)
        is_deaf = calls[0] == "deaf"
        if is_deaf:
            calls.pop(0)
        blocks: List[Dict[str, Any]] = [{"type": "text", "text": "Let me see."}]
        calls = [(*call, "toolu_%d" % n)[:3] for n, call in enumerate(calls, self.call_count)]
        self.call_count += len(calls)
        for name, arguments, call_id in calls:
            call = {"id": call_id, "name": "mcp__api__" + name, "input": arguments}
            blocks.append({"type": "tool_use", **call})
        self.delta("Let me see.")
        message = {"id": "msg_1", "role": "assistant", "content": blocks[:1], "stop_reason": None}
        self.say(type="assistant", message=message, parent_tool_use_id=None)
        for index, block in enumerate(blocks[1:], 1):
            self.call_block(index, block)
        self.event(
            type="message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 7}
        )
        self.event(type="message_stop")
        results = []
        for name, arguments, call_id in calls:
            meta = {"claudecode/toolUseId": call_id}
            results.append(self.ask("tools/call", name=name, arguments=arguments, _meta=meta))
            if is_deaf:
                os._exit(3)
        counts = {"input_tokens": 10, "output_tokens": 1}
        self.event(type="message_start", message={"id": "msg_2", "usage": counts})
        self.answer(dumps(results))

    def act_think(self, rest: str) -> None:
        """Think in two blocks, of which one is secret, then answer with `rest`."""
        thought = {"type": "thinking", "thinking": "Let me think.", "signature": "c2ln"}
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in ("Let me ", "think.")]
        self.block(0, thought, *deltas, {"type": "signature_delta", "signature": "c2ln"})
        self.block(1, {"type": "redacted_thinking", "data": "eA=="})
        self.answer(rest)

    def act_settings(self, rest: str) -> None:
        """Answer with the variables that were set, and how thoughts are shown."""
        self.answer(dumps([self.environ, self.display]))

    def act_begin_call(self, rest: str) -> None:
        """Write a part of a call, wait until the file `rest` exists; then the answer starts over.
        """
        self.delta("Let me see.")
        call = {"type": "tool_use", "id": "toolu_x", "name": "mcp__api__look", "input": {}}
        self.event(type="content_block_start", index=1, content_block=call)
        delta = {"type": "input_json_delta", "partial_json": '{"at": "s'}
        self.event(type="content_block_delta", index=1, delta=delta)
        self.wait(rest)
        self.event(type="message_start", message={"id": "msg_2", "usage": usage(1)})
        self.answer("Something else.")

    def act_grandchild(self, rest: str) -> None:
        """Start a process in a session of its own, write its pid to the file `rest`, and hang."""
        import subprocess

        code = "import time; time.sleep(60)"
        grandchild = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, stdin=subprocess.DEVNULL
        )
        with open(rest + ".part", "w") as file:
            file.write(str(grandchild.pid))
        os.replace(rest + ".part", rest)
        self.act_hang(rest)

    def act_die(self, rest: str) -> None:
        """die CODE WORDS: exit during the turn, with the words on stderr."""
        code, _, words = rest.partition(" ")
        self.delta("dying")
        sys.stderr.write(words + "\n")
        sys.stderr.flush()
        os._exit(int(code))

    def act_die_early(self, rest: str) -> None:
        """Exit before the first line of the turn. rest: the exit status."""
        sys.stderr.write("gone at once\n")
        sys.stderr.flush()
        os._exit(int(rest or 1))

    def act_garbage(self, rest: str) -> None:
        """Print a line of broken JSON, then an answer."""
        sys.stdout.buffer.write(b'{"type": "assis\n')
        sys.stdout.buffer.flush()
        self.answer("too late")

    def act_noise(self, rest: str) -> None:
        """Print debug output, blank lines, CRLF, an unknown type and a request; then answer."""
        sys.stdout.buffer.write(
            b"[DEBUG] hello\n\n   \r\n" + dumps({"type": "conversation_reset"}).encode() + b"\r\n"
        )
        sys.stdout.buffer.flush()
        self.say(type="control_request", request_id="q", request={"subtype": "can_use_tool"})
        self.answer("quiet " + rest)

    def act_flood(self, rest: str) -> None:
        """Print `rest` MiB of text in deltas of 64 KiB, then a result with all of it."""
        total = int(rest) << 20
        for _ in range(total >> 16):
            self.delta("x" * (1 << 16))
        self.result("x" * total)

    def act_line(self, rest: str) -> None:
        """Print a line of `rest` MiB that is not JSON, and hang."""
        piece = b"x" * (1 << 20)
        sys.stdout.buffer.write(b"{")
        for _ in range(int(rest)):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        time.sleep(60)

    def act_big(self, rest: str) -> None:
        """Answer with `rest` KiB."""
        self.answer("é" * (int(rest) << 9))

    def act_error(self, rest: str) -> None:
        """error JSON: print a result with these fields.

        The field `said` becomes the error word of an assistant line before the result.
        """
        fields = loads(rest)
        error_word = fields.pop("said", None)
        if error_word:
            message = {"role": "assistant", "model": "<synthetic>", "content": []}
            self.say(type="assistant", message=message, error=error_word)
        self.result(fields.pop("result", ""), **{"is_error": True, **fields})

    def act_script(self, rest: str) -> None:
        """script JSON: run the steps of a list, up to the first `result` or `fail`.

        {"delta": TEXT}             print a piece of the text
        {"message": true}           start a new message
        {"wait": FILE}              wait until the file exists
        {"pause": SECONDS}          sleep
        {"limits": INFO}            report rate limits
        {"retry": STATUS}           report that the API answered with this status
        {"first": FILE, "do": STEPS}  run these steps once, and create the file
        {"result": TEXT}            print a result
        {"fail": FIELDS}            print an error, as `error` does
        Without a result, the deltas of the last message are the answer.
        """
        if not self.steps(loads(rest)):
            self.result("".join(self.deltas))

    def steps(self, steps: List[Dict[str, Any]]) -> bool:
        """Run the steps; return whether a result was printed."""
        for step in steps:
            if "delta" in step:
                self.deltas.append(step["delta"])
                self.delta(step["delta"])
            elif "message" in step:
                self.deltas.clear()
                self.event(type="message_start", message={})
            elif "wait" in step:
                self.wait(step["wait"])
            elif "pause" in step:
                time.sleep(step["pause"])
            elif "retry" in step:
                self.say(
                    type="system",
                    subtype="api_retry",
                    attempt=1,
                    max_retries=4,
                    retry_delay_ms=545.5,
                    error_status=step["retry"],
                    error="rate_limit" if step["retry"] == 429 else "server_error",
                )
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
        """Answer as if an API key paid for it."""
        self.answer("this was billed")

    def act_env(self, rest: str) -> None:
        """Answer with the environment, as JSON."""
        self.answer(dumps(dict(os.environ)))


MODELS = [
    {
        "value": "default", "resolvedModel": "claude-sonnet-5",
        "displayName": "Default (recommended)",
    },
    {"value": "haiku", "resolvedModel": "claude-haiku-4-5", "displayName": "Haiku"},
]


def patterns_of(schema: Any) -> List[Any]:
    """Return the patterns in a schema."""
    if isinstance(schema, list):
        return [pattern for part in schema for pattern in patterns_of(part)]
    if not isinstance(schema, dict):
        return []
    return [schema.get("pattern"), *patterns_of(list(schema.values()))]


def text_of(line: Mapping[str, Any]) -> str:
    """Return the last text of a message, or the type of its last block if it has no text."""
    content = line["message"]["content"]
    texts = [block["text"] for block in content if block["type"] == "text"]
    return str(texts[-1] if texts else content[-1]["type"])


def usage(output_tokens: int) -> Dict[str, int]:
    """Return the `usage` of a message or a result."""
    return {
        "input_tokens": 10,
        "output_tokens": output_tokens,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 3,
    }


def has_input(seconds: float) -> bool:
    """Wait for a line on stdin or its end; return whether it came."""
    if os.name == "posix":
        return bool(select([0], [], [], seconds)[0])
    # On Windows select knows sockets only. Fails at the end of the input.
    import ctypes
    import msvcrt

    size = ctypes.c_ulong()
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(0))  # type: ignore[attr-defined,unused-ignore]
    if kernel.PeekNamedPipe(handle, None, 0, None, ctypes.byref(size), None) and not size.value:
        time.sleep(seconds)
        return False
    return True


def wait_for_file(path: str) -> None:
    """Wait until the file exists, at most 30 s."""
    deadline = time.monotonic() + 30
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.005)
