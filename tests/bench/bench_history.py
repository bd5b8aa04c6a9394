"""Measure the first token of requests with a history, in the ways in which clients send them.

    python tests/bench/bench_history.py [--claude PATH]... [--module PATH] [--baseline PATH]
                                        [--only NAME,...] [--rounds 7] [--json]

The real CLI runs against a fake Messages API on loopback, which answers at once. Each round starts
a bridge for each CLI (with --baseline also one of that module), which measures these parts:
  history    an unseen history of 0, 10, 50 and 200 pairs, 200 + 200 characters each
  paused     a chat of 20 turns; each begins when all processes of the bridge are still
  unpaused   a chat of 20 turns; each begins at the end of the answer before it
  one-shot   one message, also with a token whose tools are "read"
  tools      an agent's loop of 10 calls of a client's tool: from a result to the whole next call.
             Processes that were started: the next idle process is one of them.
  edits      the last turn of a chat again, and an earlier turn with another text
The first token is from before the connection to the first delta of a POST /v1/messages. Each time
the messages that the API received must be those of the client; otherwise the benchmark stops.

Beside each part stand the cold starts of the same minute: a `claude -p` with one message, up to
its first text, (a) with CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1, which the bridge sets as well,
and (b) without it. All cold starts of a CLI have the same home. A ratio is the median of the ratios
of the rounds. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import bench_first_answer as first
import common
from messages_api import MessagesApi, Reply, tool_results, turn_texts

Message = Dict[str, Any]
Figures = Dict[str, float]

CHARACTERS = 200
TURNS = 20
TOOL_CALLS = 10
# Single messages in a round.
SAMPLES = 3
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
STEP = {"name": "step", "description": "Take a step.", "input_schema": SCHEMA}
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
# Names of figures.
COLD, COLD_FULL = "cold (a)", "cold (b)"
STARTED, ANSWERED = "processes started", "processes that answered"
SLOWEST = "slowest turn"


# --- one bridge ---


class Site(NamedTuple):
    """A bridge and the API behind it. user: the bridge, with an ordinary token."""

    at: common.Served
    user: common.Served
    api: MessagesApi

    def metric(self, name: str) -> float:
        """Return a value of GET /metrics."""
        with common.open_request(self.at, "GET", "/metrics") as (_, response):
            lines = response.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    def wait_until_still(self) -> None:
        """Wait until an idle process is ready and no process of the bridge uses the CPU.

        Their number does not matter: some may remain after their answers.
        """
        deadline, still_since = time.monotonic() + 60, time.monotonic()
        last: Dict[int, int] = {}
        while time.monotonic() < deadline:
            now = first.children(self.at.pid)
            # A single tick may come from a timer. A process that has used ten or fewer is starting.
            if now.keys() != last.keys() or any(now[pid] > last[pid] + 1 for pid in now):
                last, still_since = now, time.monotonic()
            elif time.monotonic() - still_since >= first.READY_SECONDS:
                if all(ticks > 10 for ticks in now.values()) and self.metric("cab_spares"):
                    return
            time.sleep(0.02)
        raise SystemExit("the processes of the bridge did not become still within 60 s")

    def check_last_call(self, messages: Sequence[Message]) -> None:
        """Stop unless the API received exactly these messages."""
        body = self.api.messages()[-1].body
        received = [turn for turn in turn_texts(body) if turn[1]]
        sent = [(one["role"], one["content"]) for one in messages]
        texts = [(role, content) for role, content in sent if isinstance(content, str)]
        if received != texts or results_in(body["messages"]) != results_in(messages):
            raise SystemExit("the API received other messages than those of the client")

    def first_token(
        self, messages: Sequence[Message], user: Optional[common.Served] = None
    ) -> Tuple[float, str]:
        """Send the messages; return the seconds to the first delta, and the answer."""
        del self.api.calls[:]
        body = {"model": "sonnet", "max_tokens": 1000, "stream": True, "messages": messages}
        seconds, text = 0.0, ""
        opened = common.open_request(user or self.user, "POST", "/v1/messages", body)
        with opened as (start, response):
            for line in response:
                if line.startswith(b"data: ") and b'"content_block_delta"' in line:
                    seconds = seconds or time.perf_counter() - start
                    text += json.loads(line[len(b"data: ") :])["delta"]["text"]
        if not seconds:
            raise SystemExit("the stream ended without an answer (status %d)" % response.status)
        self.check_last_call(messages)
        return seconds, text


def new_user(at: common.Served, **fields: Any) -> common.Served:
    """Return the bridge with a new ordinary token."""
    body = common.call(at, "POST", "/api/tokens", {"name": "bench", **fields})
    return at._replace(token=body["token"])


def words() -> str:
    """Return a text that no process has received before."""
    return "a%sz" % "".join(random.choices("abcdefghijklmnopqrstuvwxyz    ", k=CHARACTERS - 2))


def prompt() -> Message:
    """Return a new message of the user."""
    return {"role": "user", "content": words()}


def results_in(messages: Sequence[Message]) -> List[Tuple[bool, str]]:
    """Return all tool results of a conversation, in order."""
    users = [message for message in messages if message["role"] == "user"]
    return [result for message in users for result in tool_results({"messages": [message]})]


# --- the parts: each returns its figures ---


def unseen_history(site: Site) -> Figures:
    """Send histories that no process has."""
    figures = {}
    for count in (0, 10, 50, 200):
        history = [{"role": role, "content": words()} for role in ("user", "assistant") * count]
        site.wait_until_still()
        figures["%d pairs" % count], _ = site.first_token([*history, prompt()])
    return figures


def chat(site: Site, turns: int, is_paused: bool) -> Tuple[List[float], List[Message]]:
    """Hold a chat; return the seconds of each turn, and its messages."""
    times = []
    messages: List[Message] = []
    for number in range(turns):
        if is_paused or number == 0:
            site.wait_until_still()
        messages.append(prompt())
        seconds, answer = site.first_token(messages)
        times.append(seconds)
        messages.append({"role": "assistant", "content": answer})
    return times, messages


def paused_chat(site: Site) -> Figures:
    """Measure the turns of a chat with pauses."""
    (opening, *later), _ = chat(site, TURNS, is_paused=True)
    return {"first turn": opening, "later turns": statistics.median(later)}


def unpaused_chat(site: Site) -> Figures:
    """Measure the turns of a chat without pauses."""
    times, _ = chat(site, TURNS, is_paused=False)
    return {"mean turn": statistics.mean(times), SLOWEST: max(times)}


def one_shot(site: Site) -> Figures:
    """Measure single messages without tools, and with those that read files; they take turns."""
    users = {"one message": site.user, "tools read": new_user(site.at, tools="read")}
    times: Dict[str, List[float]] = {name: [] for name in users}
    for _ in range(SAMPLES):
        for name, user in users.items():
            site.wait_until_still()
            times[name].append(site.first_token([prompt()], user)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def edits(site: Site) -> Figures:
    """Repeat the last turn of a chat, then change an earlier one."""
    _, messages = chat(site, 5, is_paused=True)
    site.wait_until_still()
    again, _ = site.first_token(messages[:-1])
    site.wait_until_still()
    edited, _ = site.first_token([*messages[:4], prompt()])
    return {"last turn again": again, "earlier turn edited": edited}


def call_step(body: Dict[str, Any]) -> Reply:
    """Reply as a model that calls the tool until it has enough results."""
    number = len(results_in(body["messages"]))
    if number == TOOL_CALLS:
        return Reply("done")
    call_id = "toolu_%032x_0" % random.getrandbits(128)
    return Reply(tools=(("mcp__api__step", {"n": number}),), ids=(call_id,))


def step(site: Site, messages: Sequence[Message]) -> Tuple[float, List[Message]]:
    """Send the messages with the tool; return the seconds to the whole answer, and its content."""
    body = {"model": "sonnet", "max_tokens": 1000, "tools": [STEP], "messages": messages}
    with common.open_request(site.user, "POST", "/v1/messages", body) as (start, response):
        answer = json.loads(response.read())
        seconds = time.perf_counter() - start
    if response.status != 200:
        raise SystemExit("the bridge answered: %s" % answer)
    site.check_last_call(messages)
    return seconds, answer["content"]


def tool_loop(site: Site) -> Figures:
    """Answer the calls of the tool; count the processes."""
    site.wait_until_still()
    del site.api.calls[:]
    starts = site.metric("cab_cli_starts_total")
    reply, site.api.reply = site.api.reply, call_step
    messages = [prompt()]
    opening, content = step(site, messages)
    times = []
    for number in range(TOOL_CALLS):
        result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": str(number)}
        messages.append({"role": "assistant", "content": content})
        messages.append({"role": "user", "content": [result]})
        seconds, content = step(site, messages)
        times.append(seconds)
    site.api.reply = reply
    answered = {call.headers["x-claude-code-session-id"] for call in site.api.messages()}
    # The next idle process may start late.
    site.wait_until_still()
    return {
        "first call": opening,
        "result to next call": statistics.median(times[:-1]),
        "result to the end": times[-1],
        ANSWERED: len(answered),
        STARTED: site.metric("cab_cli_starts_total") - starts,
    }


PARTS: Dict[str, Callable[[Site], Figures]] = {
    "history": unseen_history, "paused": paused_chat, "unpaused": unpaused_chat,
    "one-shot": one_shot, "tools": tool_loop, "edits": edits,
}


class Target(NamedTuple):
    """The most that a figure may be: so many times another figure of its part, or a number.

    since, before: the versions of the CLI.
    """

    part: str
    figure: str
    most: float
    base: str = ""
    since: Tuple[int, ...] = ()
    before: Tuple[int, ...] = (999,)


REWINDING = (2, 1, 332)
TARGETS = (
    Target("history", "200 pairs", 1.5, "0 pairs", since=REWINDING),
    Target("history", "50 pairs", 1.3, "0 pairs", since=REWINDING),
    Target("history", "200 pairs", 0.6, COLD, before=REWINDING),
    Target("paused", "later turns", 0.5, "first turn"),
    Target("paused", "later turns", 0.15, COLD),
    # The same as all turns to as many cold starts.
    Target("unpaused", "mean turn", 0.3, COLD),
    Target("unpaused", SLOWEST, 0.15),
    Target("one-shot", "one message", 0.27, COLD),
    Target("tools", "result to next call", 0.02),
    Target("tools", ANSWERED, 1),
    Target("tools", STARTED, 1),
    Target("one-shot", "tools read", 1.5, "one message"),
)


# --- all measurements ---


class Subject(NamedTuple):
    """A module of the bridge with a CLI. home: of the cold starts."""

    claude: str
    version: str
    module: Path
    home: Path

    def cold(self, api: MessagesApi) -> Tuple[float, float]:
        """Return the seconds to the first text of both kinds of cold start."""
        environ = first.environment(api)
        quiet, _ = common.cold(self.claude, {**environ, **QUIET}, self.home)
        full, _ = common.cold(self.claude, environ, self.home)
        return quiet, full


def measure_round(
    subject: Subject, names: Sequence[str], api: MessagesApi, folder: Path
) -> Dict[str, Figures]:
    """Measure the parts with a bridge of their own, each between two cold starts of each kind."""
    figures: Dict[str, Figures] = {}
    options = ("--claude", subject.claude)
    with common.bridge(folder, first.environment(api), *options, module=subject.module) as at:
        site = Site(at, new_user(at), api)
        # The first ones are slower: a new home, and a bridge that expects requests without a model.
        site.wait_until_still()
        site.first_token([prompt()])
        subject.cold(api)
        for name in names:
            site.wait_until_still()
            before = subject.cold(api)
            measured = PARTS[name](site)
            site.wait_until_still()
            quiet, full = map(statistics.mean, zip(before, subject.cold(api)))
            figures[name] = {COLD: quiet, COLD_FULL: full, **measured}
    return figures


def measure(
    subjects: Sequence[Subject], options: argparse.Namespace, folder: Path
) -> List[Dict[str, Any]]:
    """Return the results of each subject; they take turns."""
    rounds: List[List[Dict[str, Figures]]] = [[] for _ in subjects]
    with MessagesApi() as api:
        api.reply = lambda body: Reply(words())
        for number in range(1, options.rounds + 1):
            for n, subject in enumerate(subjects):
                home = folder / ("bridge-%d-%d" % (number, n))
                rounds[n].append(measure_round(subject, options.only, api, home))
                done = (number, subject.module.name, subject.version)
                print("round %d, %s, %s: done" % done, file=sys.stderr)
    return [result_of(*pair) for pair in zip(subjects, rounds)]


def result_of(subject: Subject, rounds: Sequence[Dict[str, Figures]]) -> Dict[str, Any]:
    """Return the figures of a subject, and those that have targets."""

    def ratio(part: str, figure: str, base: str) -> float:
        return statistics.median(one[part][figure] / one[part][base] for one in rounds)

    rows: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for part, figures in rounds[0].items():
        for figure in figures:
            values = [one[part][figure] for one in rounds]
            row = {"median": statistics.median(values), "most": max(values)}
            if figure not in (STARTED, ANSWERED):
                row.update(ratio=ratio(part, figure, COLD), full=ratio(part, figure, COLD_FULL))
            rows[part, figure] = {"part": part, "figure": figure, **row}
    judged = []
    version = tuple(map(int, subject.version.split()[0].split(".")))
    for part, figure, most, base, since, before in TARGETS:
        if part in rounds[0] and since <= version < before:
            is_bound = figure in (SLOWEST, STARTED, ANSWERED)
            value = rows[part, figure]["most" if is_bound else "median"]
            name = "%s, %s%s" % (part, figure, base and " to " + base)
            value = ratio(part, figure, base) if base else value
            judged.append({"name": name, "value": value, "target": most})
    names = {"version": subject.version, "module": str(subject.module), "rounds": len(rounds)}
    return {**names, "rows": list(rows.values()), "judged": judged}


def table(result: Dict[str, Any]) -> str:
    """Return the results of a subject as text."""
    lines = ["%(version)s, %(module)s, %(rounds)d rounds" % result]
    lines.append("%-34s %8s %8s %7s %7s" % ("", "median", "most", "to (a)", "to (b)"))
    for row in result["rows"]:
        form = "%(part)-10s %(figure)-23s %(median)8g %(most)8g"
        if "ratio" in row:
            form = "%(part)-10s %(figure)-23s %(median)8.3f %(most)8.3f %(ratio)7.2f %(full)7.2f"
        lines.append(form % row)
    return "\n".join(lines + [common.judged(**one) for one in result["judged"]])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure all subjects; print a table of each, or JSON."""
    parser = argparse.ArgumentParser(description="Measure the first token with a history.")
    add, names = parser.add_argument, ",".join(PARTS)
    add("--claude", action="append", help="a real CLI; repeatable (default: `claude` in PATH)")
    add("--module", type=Path, default=common.MODULE, help="the file of the bridge")
    add("--baseline", type=Path, help="another file of the bridge, measured in turn")
    add("--rounds", type=int, default=7, help="bridges of each kind (default: 7)")
    add("--only", default=names, help="some of the parts, which are %(default)s")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if not set(options.only) <= set(PARTS):
        parser.error("--only takes some of " + names)
    subjects = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for n, named in enumerate(options.claude or ["claude"]):
            claude = first.find_claude(named)
            if not claude:
                return 2
            version, home = first.version_of(claude, folder), Path(folder, "cold-%d" % n)
            for module in filter(None, (options.module, options.baseline)):
                subjects.append(Subject(claude, version, module, home))
        results = measure(subjects, options, Path(folder))
    if options.json:
        print(json.dumps(results))
    else:
        print("Seconds. (a), (b): `claude -p` that streams, with %s=%s, and without" % (*QUIET, 1))
        print("\n\n".join(map(table, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
