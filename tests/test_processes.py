"""Tests of the claude processes: every way in which one can behave, and what remains afterwards."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import pytest
from conftest import FakeClaude, FakeClock, RunningBridge, is_running, run_cli, wait_until
from fake_claude import FLAGS
from test_stream import Skipped, script

import claude_api_bridge as cab

Fakes = Callable[..., FakeClaude]  # what the fixtures return
Bridges = Callable[..., RunningBridge]
Directs = Callable[..., "Direct"]
Talks = Callable[..., "Talk"]
LIMIT_REACHED: Dict[str, Any] = {
    "said": "rate_limit",
    "api_error_status": 429,
    "result": "You've hit your session limit · resets 8:28am (UTC)",
}
OVERLOADED: Dict[str, Any] = {
    "said": "server_error",
    "api_error_status": 529,
    "result": "API Error: 529 Overloaded.",
}
RESET = 1_800_003_600  # in an hour, by FakeClock
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def twist(fake: FakeClaude, code: str) -> FakeClaude:
    """Add a fault to the fake: `code` runs before its main."""
    fake.script.write_text(fake.script.read_text().replace("sys.exit(", code + "\nsys.exit(", 1))
    return fake


def pids_of(fake: FakeClaude, prompt: str) -> List[int]:
    """Return the processes that received this prompt, in order."""
    return [
        entry["pid"]
        for entry in fake._log("lines.jsonl")
        if entry["line"]["type"] == "user"
        and entry["line"].get("shouldQuery") is not False
        and entry["line"]["message"]["content"][0]["text"] == prompt
    ]


def skip_time(
    patch: pytest.MonkeyPatch, clock: Skipped, after: str, at: Optional[str], most: float = 1e9
) -> None:
    """Let 150 seconds pass at every event of the kind `at` after the first one of the kind `after`.

    at: None for every moment of silence.

    most: upper bound of the seconds skipped.

    The time that a process takes to start does not count.
    """
    take = cab.ClaudeProcess.next_event
    kinds: List[Optional[str]] = []

    def next_event(child: cab.ClaudeProcess, timeout: float) -> Optional[cab.CliEvent]:
        event = take(child, timeout)
        kind = event.kind if event else None
        if after in kinds and kind == at and clock.ahead < most:
            clock.ahead += 150
        kinds.append(kind)
        return event

    patch.setattr(cab.ClaudeProcess, "next_event", next_event)


def argv_of(fake: FakeClaude, pid: int) -> List[str]:
    return next(start["argv"] for start in fake.children() if start["pid"] == pid)


def spare_of(fake: FakeClaude) -> int:
    """Return the pid of the first spare, once it exists."""
    return int(wait_until(fake.children)[0]["pid"])


def error(**fields: Any) -> str:
    """Return a prompt that the fake answers with a result with these fields."""
    return "error " + json.dumps(fields)


class Direct:
    """A pool and its runner alone, without queue and HTTP. A test refills the pool itself.

    limits: the plan limits that were reported.
    """

    def __init__(
        self, fake: FakeClaude, install: cab.ClaudeInstall, config: cab.Config, clock: cab.Clock
    ) -> None:
        self.fake, self.install, self.data_dir = fake, install, config.data_dir
        self.pool = cab.ClaudePool(
            cab.ClaudeProgram(install), config, clock, "test%d" % os.getpid()
        )
        self.runner = cab.ClaudeRunner(self.pool)
        self.limits: List[cab.RateLimitStatus] = []

    def run(
        self,
        message: str,
        stop_reason: Callable[[], Optional[str]] = lambda: None,
        work: Mapping[str, Any] = {},
        live: Optional[cab.LiveText] = None,
        **fields: Any,
    ) -> cab.Answer:
        """Run a message. work: fields of the RunRequest. fields: of its SessionConfig."""
        session = cab.SessionConfig(**{"system_prompt": cab.SYSTEM_PROMPT, **fields})
        return self.runner.run(
            cab.RunRequest(message, session, **work), live or cab.LiveText(), stop_reason,
            self.limits.append,
        )

    def failed(self, message: str, **options: Any) -> cab.RunFailed:
        """Return the error of a run that must fail, once its processes are gone."""
        with pytest.raises(cab.RunFailed) as caught:
            self.run(message, **options)
        self.wait_for_end(*pids_of(self.fake, message))
        return caught.value

    def failure(self, message: str, **options: Any) -> Tuple[str, str]:
        """Return (code, text) of a run that must fail."""
        failed = self.failed(message, **options)
        return failed.code, str(failed)

    def wait_for_end(self, *pids: int) -> None:
        """Wait until these processes are gone, which is soon.

        No run waits for a terminating process; the worker reaps it, here the test.
        """

        def are_gone() -> bool:
            self.pool.advance()
            return not any(map(is_running, pids))

        wait_until(are_gone)

    def prepare(self) -> int:
        """Refill the pool and finish a preparation. -> the process that is prepared."""

        def prepared() -> List[int]:
            self.pool.maintain()
            if self.pool.is_busy:
                return []
            asked = {pid for prompt in self.fake.prompts() for pid in pids_of(self.fake, prompt)}
            return [
                pid for pid in instructions_of(self.fake) if pid not in asked and is_running(pid)
            ]

        (pid,) = wait_until(prepared)
        return int(pid)

    def talk(self, name: str, message: str, **fields: Any) -> cab.Answer:
        """Run a turn of a conversation."""
        return self.run(message, work={"conversation": name}, **fields)


@pytest.fixture
def direct(tmp_path: Path, fake_claude: Fakes) -> Iterator[Directs]:
    """direct(claude=..., detect=..., environ=..., clock=..., **settings) -> a Direct.

    By default it has no spare. detect: ask the fake for its version, as a start does; otherwise it
    is given, which is faster.
    """
    made: List[Direct] = []

    def make(
        claude: Optional[FakeClaude] = None,
        detect: bool = False,
        environ: Optional[Mapping[str, str]] = None,
        clock: Optional[cab.Clock] = None,
        **settings: Any,
    ) -> Direct:
        fake = claude or fake_claude()
        config = cab.Config(
            **{"data_dir": tmp_path / "data", "claude": str(fake.path), "spare": 0, **settings}
        )
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **(environ or {})}
        child_environ = cab.child_environment(environ, config.allow_api_key, None)
        install = cab.ClaudeInstall(
            (str(fake.path),), cab.Features.read("2.1.330", FLAGS), child_environ, ""
        )
        made.append(
            Direct(
                fake, cab.find_claude(config, environ) if detect else install, config,
                clock or cab.Clock(),
            )
        )
        return made[-1]

    yield make
    for instance in made:
        instance.pool.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the remaining processes sooner, in tests of something else."""
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 0.2)


# --- answers ---


def test_an_answer_arrives_with_its_model_and_usage(direct: Directs) -> None:
    answer = direct().run("hello", model="haiku")
    assert (answer.text, answer.model) == ("Echo: hello", "resolved-haiku")
    assert answer.usage == cab.Usage(10, 7, 5, 3, 0.002)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("noise here", "quiet here"),
        ("/compact", "Echo:  /compact"),  # leading blank: not a command
        (
            "say line\u2028one\r\nline two\x00\ttab \U0001f600",
            "line\u2028one\r\nline two\x00\ttab \U0001f600",
        ),
        ("say ", ""),
    ],
)
def test_these_prompts_are_answered(direct: Directs, prompt: str, text: str) -> None:
    assert direct().run(prompt).text == text


def test_a_control_request_of_the_cli_is_declined(direct: Directs) -> None:
    d = direct()
    d.run("noise")
    wait_until(
        lambda: [
            line
            for line in d.fake.lines()
            if line["type"] == "control_response"
            and line["response"]["request_id"] == "q"
            and line["response"]["subtype"] == "error"
        ]
    )


def test_an_answer_of_megabytes_arrives_whole(bridge: Bridges) -> None:
    body = bridge().admin.answer("big 2048")
    assert body["status"] == "completed" and body["response"] == "é" * (1 << 20)


def test_a_structured_answer_comes_back_parsed(direct: Directs) -> None:
    assert json.loads(direct().run("hi", json_schema='{"type":"object"}').structured or "") == {
        "answer": "Echo: hi"
    }


def test_a_schema_that_was_not_satisfied_is_an_error(direct: Directs, fake_claude: Fakes) -> None:
    fake = twist(fake_claude(), "fake_claude.Fake.answer = lambda self, text: self.result(text)")
    code, text = direct(fake).failure("hi", json_schema="{}")
    assert code == "cli_error" and "jsonSchema" in text


# --- live text ---


def test_a_character_that_came_in_two_halves_arrives_whole(direct: Directs) -> None:
    seen: List[str] = []
    live = cab.LiveText(on_change=lambda: seen.append(live.read()))
    answer = direct().run(script({"delta": "a\ud83d"}, {"delta": "\ude00b"}), live=live)
    assert answer.text == live.read() == "a\U0001f600b"
    # No reader ever received half of it.
    assert set(seen) == {"", "a", "a\U0001f600b"}


@pytest.mark.parametrize(
    "delta, result, begins",
    [("Hel", "Hello", 1), ("Hello", "Hello", 1), ("Hello", "Bye", 2), ("Hello", "Hel", 2)],
)
def test_a_stream_ends_with_the_text_of_the_result(
    bridge: Bridges, gate: Path, delta: str, result: str, begins: int
) -> None:
    b = bridge()
    stream = b.admin.follow(
        b.admin.ask(script({"delta": delta}, {"wait": str(gate)}, {"result": result}))
    )
    assert stream.until("delta").data["text"] == delta
    gate.touch()
    kinds = [event.kind for event in stream.rest()]
    assert stream.text == stream.events[-1].data["response"] == result
    assert (kinds.count("started"), kinds[-1]) == (begins, "completed")


def test_text_before_a_tool_call_is_not_part_of_the_answer(direct: Directs) -> None:
    live = cab.LiveText()
    direct().run(
        script({"delta": "Let me look."}, {"message": True}, {"delta": "It "}, {"delta": "rains."}),
        live=live,
    )
    assert (live.read(), live.generation, live.model) == ("It rains.", 1, "resolved-default-model")


# --- spares ---


def test_an_idle_spare_answers_and_is_replaced(bridge: Bridges, fake_claude: Fakes) -> None:
    fake = fake_claude()
    b = bridge(claude=fake, spare=1)
    spare = spare_of(fake)
    b.admin.answer("one")
    second = int(wait_until(lambda: fake.children()[1:])[0]["pid"])
    b.admin.answer("two")
    assert pids_of(fake, "one") == [spare] and pids_of(fake, "two") == [second]
    wait_until(lambda: not is_running(spare) and not is_running(second))


def test_without_a_spare_every_request_starts_its_own_process(direct: Directs) -> None:
    d = direct()
    d.pool.maintain()
    assert d.fake.children() == []
    d.run("one")
    d.run("two")
    assert [child["pid"] for child in d.fake.children()] == pids_of(d.fake, "one") + pids_of(
        d.fake, "two"
    )


def test_a_spare_that_died_is_not_noticed_by_the_caller(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    b = bridge(claude=fake, spare=1)
    spare = spare_of(fake)
    os.kill(spare, signal.SIGKILL)
    assert b.admin.answer("hello")["response"] == "Echo: hello"
    assert spare not in pids_of(fake, "hello")


def test_the_next_spare_starts_while_a_long_run_continues(
    bridge: Bridges, fake_claude: Fakes, gate: Path
) -> None:
    fake = fake_claude()
    b = bridge(claude=fake, spare=1)
    spare = spare_of(fake)
    request = b.admin.ask("hold %s" % gate)
    wait_until(lambda: fake.children()[1:])
    assert b.admin.poll(request)["status"] == "processing"
    gate.touch()
    assert b.admin.done(request)["response"] == "held"
    assert pids_of(fake, "hold %s" % gate) == [spare]


@pytest.mark.parametrize("count", [2, 3])
def test_the_requested_number_of_spares_waits_and_the_oldest_answers(
    bridge: Bridges, fake_claude: Fakes, count: int
) -> None:
    fake = fake_claude()
    b = bridge(claude=fake, spare=count)
    spares = [
        child["pid"]
        for child in wait_until(lambda: fake.children()[count - 1 :] and fake.children())
    ]
    wait_until(lambda: "cab_spares %d\n" % count in b.admin.get("/metrics").data.decode())
    assert b.admin.answer("one")["response"] == "Echo: one"
    assert b.admin.answer("two")["response"] == "Echo: two"
    first, second = pids_of(fake, "one") + pids_of(fake, "two")
    assert first != second and {first, second} <= set(spares)
    # The third one waits for a history.
    resumed = [session_in(argv_of(fake, pid), "--resume") for pid in spares]
    assert sum(map(bool, resumed)) == count - 2
    wait_until(
        lambda: (
            len(fake.children()) == count + 2
            and sum(is_running(child["pid"]) for child in fake.children()) == count
        )
    )


def instructions_of(fake: FakeClaude) -> Dict[int, List[str]]:
    """Return the system prompts that every process was initialized with."""
    instructions: Dict[int, List[str]] = {}
    for entry in fake._log("lines.jsonl"):
        request = entry["line"].get("request") or {}
        if request.get("subtype") == "initialize":
            instructions.setdefault(entry["pid"], []).append(request["systemPrompt"])
    return instructions


def test_one_of_two_spares_is_initialized_once_with_the_default_session(direct: Directs) -> None:
    d = direct(spare=2)
    spare = d.prepare()
    assert instructions_of(d.fake) == {spare: [cab.SYSTEM_PROMPT]}
    assert not d.fake.prompts() and d.run("hi").text == "Echo: hi"
    assert pids_of(d.fake, "hi") == [spare]
    assert instructions_of(d.fake) == {spare: [cab.SYSTEM_PROMPT]}


def test_a_single_spare_is_left_for_any_configuration(direct: Directs) -> None:
    d = direct(spare=1)
    d.pool.maintain()
    spare = spare_of(d.fake)
    d.pool.maintain()
    assert not d.pool.is_busy and d.fake.lines() == []
    d.run("hi", system_prompt="Be brief.")
    assert pids_of(d.fake, "hi") == [spare]
    assert instructions_of(d.fake) == {spare: ["Be brief."]}


@pytest.mark.parametrize(
    "own",
    [{"system_prompt": "Be brief."}, {"model": "haiku"}, {"json_schema": "{}"}, {"effort": "low"}],
    ids=lambda own: next(iter(own)),
)
def test_a_request_with_its_own_settings_never_gets_a_process_initialized_with_others(
    direct: Directs, own: Mapping[str, Any]
) -> None:
    d = direct(spare=2)
    system_prompt = own.get("system_prompt", cab.SYSTEM_PROMPT)

    def run(message: str, spare: int, is_prepared: bool, **fields: Any) -> None:
        d.run(message, **fields)
        (pid,) = pids_of(d.fake, message)
        assert is_prepared == (pid == spare)
        expected = fields.get("system_prompt", cab.SYSTEM_PROMPT)
        assert instructions_of(d.fake)[pid] == [expected]

    plain = d.prepare()
    run("one", plain, False, **own)
    assert d.prepare() == plain
    run("two", plain, False, **own)
    # After the second request with the same settings a process is prepared for these.
    spare = d.prepare()
    d.wait_for_end(plain)
    assert instructions_of(d.fake)[spare] == [system_prompt]
    run("plain 1", spare, False)
    assert d.prepare() == spare
    run("three", spare, True, **own)
    # One request of each kind in turn changes nothing.
    spare = d.prepare()
    assert instructions_of(d.fake)[spare] == [system_prompt]
    for n in (2, 3):
        run("plain %d" % n, spare, False)
        spare = d.prepare()
    assert instructions_of(d.fake)[spare] == [cab.SYSTEM_PROMPT]
    run("plain 4", spare, True)


def test_of_several_spares_only_one_is_initialized_in_advance(direct: Directs) -> None:
    d = direct(spare=2)
    d.pool.maintain()
    first, second = (
        child["pid"] for child in wait_until(lambda: d.fake.children()[1:] and d.fake.children())
    )
    wait_until(lambda: instructions_of(d.fake))
    (ahead,) = instructions_of(d.fake)
    d.run("own", system_prompt="Be brief.")
    assert {first, second} == {ahead, *pids_of(d.fake, "own")}
    assert instructions_of(d.fake)[pids_of(d.fake, "own")[0]] == ["Be brief."]


def test_a_spare_that_ended_by_itself_is_replaced_half_a_minute_later(
    direct: Directs, clock: FakeClock
) -> None:
    d = direct(spare=2, clock=clock)
    dead = d.prepare()
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: not is_running(dead))
    for seconds, count in ((0, 1), (29, 1), (2, 2)):
        clock.advance(seconds)
        d.pool.maintain()
        assert d.pool.idle_count == count


ONCE = """
import os
act = fake_claude.Fake.act
def once(self, text):
    mark = self.folder + "/died"
    if not os.path.exists(mark):
        open(mark, "w").close()
        text = "die-early 1"
    act(self, text)
fake_claude.Fake.act = once
"""


def test_a_spare_that_dies_before_it_accepts_the_prompt_is_replaced_by_a_new_process(
    direct: Directs, fake_claude: Fakes
) -> None:
    d = direct(twist(fake_claude(), ONCE), spare=1)
    d.pool.maintain()
    assert d.run("hello").text == "Echo: hello"
    assert len(set(pids_of(d.fake, "hello"))) == 2


def test_a_new_process_that_dies_before_it_accepts_the_prompt_is_an_error(direct: Directs) -> None:
    d = direct()
    code, text = d.failure("die-early 4")
    assert code == "cli_error" and "exit code 4" in text and "gone at once" in text
    assert len(pids_of(d.fake, "die-early 4")) == 1


def test_a_prompt_that_a_process_accepted_is_not_retried(direct: Directs) -> None:
    d = direct(spare=1)
    d.pool.maintain()
    assert d.failure("die 1")[0] == "cli_error"
    assert len(pids_of(d.fake, "die 1")) == 1


# --- faults ---


@pytest.mark.parametrize(
    "prompt, code, words, settings, after, at",
    [
        ("garbage", "cli_error", "not valid JSON", {}, "", None),
        (
            "die 3 the reason", "cli_error", "(exit code 3) without an answer: the reason", {}, "",
            None,
        ),
        ("die 0", "cli_error", "exit code 0", {}, "", None),
        (
            "hang", "network", "sent nothing for 200 seconds",
            {"silence_seconds": 200, "run_seconds": 9000}, "delta", None,
        ),
        (
            "chatty", "network", "longer than 600 seconds, in which claude tried to reach the API",
            {"silence_seconds": 200, "run_seconds": 600}, "retry", "retry",
        ),
        (
            "stubborn", "timeout", "longer than 300 seconds",
            {"run_seconds": 300, "silence_seconds": 9000}, "delta", None,
        ),
    ],
)
def test_a_fault_ends_the_run_and_its_process(
    direct: Directs,
    hasty: None,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    code: str,
    words: str,
    settings: Mapping[str, Any],
    after: str,
    at: Optional[str],
) -> None:
    clock = Skipped()
    d = direct(clock=clock, **settings)
    with monkeypatch.context() as patch:
        skip_time(patch, clock, after, at)
        error_code, text = d.failure(prompt)
    assert error_code == code and words in text
    assert d.run("and now").text == "Echo: and now"


def test_secrets_on_stderr_are_cut(direct: Directs) -> None:
    secrets = ("sk-ant-oat01-" + "A1b2" * 10, cab.new_token())
    _, text = direct().failure("die 1 %s and %s" % secrets)
    assert "sk-ant-oat01..." in text and not any(secret[20:] in text for secret in secrets)


def test_a_secret_is_cut_even_in_shortened_stderr(direct: Directs) -> None:
    secret = "sk-ant-oat01-" + "A1b2" * 20
    _, text = direct().failure("die 1 " + "y" * 450 + " " + secret + " " + "word " * 800)
    assert "word word" in text and "A1b2" not in text


@pytest.mark.parametrize(
    "name, prompt",
    [("OUTPUT_BYTES", "flood 2"), ("LINE_BYTES", "line 2"), ("OUTPUT_BYTES", "big 1100")],
)
def test_too_much_output_ends_the_run(
    direct: Directs, monkeypatch: pytest.MonkeyPatch, name: str, prompt: str
) -> None:
    monkeypatch.setattr(cab, name, 1 << 20)
    assert direct().failure(prompt)[0] == "output_too_large"


ENDLESS = """
def endless(self, rest):
    while True:
        self.delta("x" * 65536)
fake_claude.Fake.act_endless = endless
"""


def test_an_endless_answer_ends_at_the_limit(
    direct: Directs, fake_claude: Fakes, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "OUTPUT_BYTES", 1 << 20)
    code, _ = direct(twist(fake_claude(), ENDLESS), run_seconds=10).failure("endless")
    assert code == "output_too_large"


def test_a_tool_may_run_in_silence(
    direct: Directs, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Skipped()
    skip_time(monkeypatch, clock, "assistant", None, 600)

    def open_late() -> None:
        if clock.ahead == 600:
            gate.touch()

    d = direct(clock=clock, silence_seconds=200, run_seconds=9000)
    assert d.run("tool %s" % gate, stop_reason=open_late).text == "done"
    assert clock.ahead == 600


FORGOTTEN = """
import time
def forgotten(self, rest):
    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "ok"}
    self.say(type="assistant", message={"content": [use]})
    self.say(type="user", message={"content": [result]})
    time.sleep(60)
fake_claude.Fake.act_forgotten = forgotten
"""


def test_silence_counts_again_once_the_tool_is_done(
    direct: Directs, fake_claude: Fakes, hasty: None
) -> None:
    fake = twist(fake_claude(), FORGOTTEN)
    code, text = direct(fake, silence_seconds=0.15, run_seconds=20).failure("forgotten")
    # The CLI has asked the API for the next message.
    assert code == "network" and "The API sent nothing" in text


SILENT = """
import time
fake_claude.Fake.event = lambda self, **fields: time.sleep(60)
"""


@pytest.mark.parametrize(
    "fault, after, seconds, outcome",
    [
        (SILENT, "init", 140.0, ("network", "The API sent nothing for 140 seconds.", True)),
        # An answer that has begun may pause for longer.
        ("", "delta", 1.0, ("network", "The API sent nothing for 200 seconds.", True)),
    ],
)
def test_a_silent_api_is_a_lost_network(
    direct: Directs, fake_claude: Fakes, hasty: None, monkeypatch: pytest.MonkeyPatch,
    fault: str, after: str, seconds: float, outcome: Tuple[str, str, bool],
) -> None:
    """Packets that a firewall drops, and a server that accepts and says nothing, look the same."""
    clock = Skipped()
    d = direct(twist(fake_claude(), fault), clock=clock, silence_seconds=200, run_seconds=9000)
    with monkeypatch.context() as patch:
        skip_time(patch, clock, after, None)
        failure = d.failed("hang", work={"answer_seconds": seconds})
    assert (failure.code, str(failure), failure.is_answered) == outcome


def test_a_dead_process_is_noticed_while_descendants_hold_its_pipes_and_they_end(
    bridge: Bridges, fake_claude: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "DRAIN_AFTER_EXIT_SECONDS", 0.1)
    fake, note = fake_claude(), tmp_path / "pid"
    b = bridge(claude=fake, silence_seconds=20)
    request = b.admin.new_token(tools="all").ask("grandchild %s" % note)
    wait_until(note.exists)
    os.kill(pids_of(fake, "grandchild %s" % note)[0], signal.SIGKILL)
    body = b.admin.done(request)
    assert (body["errorCode"], "exit code" in body["error"]) == ("cli_error", True)
    if sys.platform == "linux":  # elsewhere its owner is unknown
        wait_until(lambda: not is_running(int(note.read_text())))
    else:
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_missing_workspace_is_an_error_and_the_next_request_runs(
    direct: Directs, tmp_path: Path
) -> None:
    d = direct()
    code, text = d.failure("hello", tools="read", workspace=str(tmp_path / "nowhere"))
    assert code == "cli_error" and "nowhere" in text
    assert d.run("hello").text == "Echo: hello"


RESULTS: List[Tuple[Dict[str, Any], str]] = [
    (
        {
            "said": "rate_limit",
            "api_error_status": 429,
            "result": "API Error: Server is temporarily limiting requests",
        },
        "overloaded",
    ),
    (
        {"said": "rate_limit", "result": "API Error: Temporarily limited (not your usage limit)"},
        "overloaded",
    ),
    (
        {
            "said": "authentication_failed",
            "api_error_status": 401,
            "result": "Failed to authenticate: 401",
        },
        "auth_required",
    ),
    (
        {
            "said": "authentication_failed",
            "api_error_status": 403,
            "result": "Your account does not have access to Claude.",
        },
        "auth_required",
    ),
    ({"result": "Not logged in · Please run /login"}, "auth_required"),
    ({"result": "Invalid API key · Please run /login"}, "auth_required"),
    (OVERLOADED, "overloaded"),
    ({"said": "server_error", "result": "API Error: 500 Internal server error"}, "network"),
    (
        {
            "said": "model_not_found",
            "api_error_status": 404,
            "result": "There's an issue with the selected model (x).",
        },
        "model_not_found",
    ),
    ({"result": "There's an issue with the selected model (x)."}, "model_not_found"),
    (
        {
            "said": "invalid_request",
            "api_error_status": 413,
            "result": "Request too large (max 32MB).",
        },
        "request_too_large",
    ),
    (
        {"said": "invalid_request", "api_error_status": 400, "result": "Prompt is too long"},
        "context_too_long",
    ),
    (
        {"api_error_status": 400, "result": "Too much", "terminal_reason": "prompt_too_long"},
        "context_too_long",
    ),
    (
        {"said": "unknown", "api_error_status": 400, "result": "API Error: 400 odd"},
        "invalid_request",
    ),
    (
        {"said": "billing_error", "api_error_status": 400, "result": "Credit balance is too low"},
        "cli_error",
    ),
    (
        {"subtype": "error_max_turns", "errors": ["Reached maximum number of turns (1)"]},
        "cli_error",
    ),
    ({"subtype": "error_during_execution", "is_error": False, "errors": ["odd"]}, "cli_error"),
]


def test_error_results_end_the_run_at_once_with_their_code_and_text(direct: Directs) -> None:
    d = direct()
    for fields, code in RESULTS:
        prompt = error(**fields)
        failed = d.failed(prompt)
        text = str(fields.get("result") or fields.get("errors", [""])[0])
        assert (failed.code, str(failed)) == (code, text), fields
        assert failed.is_of_model == (code == "overloaded"), fields
        assert len(pids_of(d.fake, prompt)) == 1, fields
    assert d.run("fine").text == "Echo: fine"


def test_settings_that_the_cli_refuses_are_an_error(direct: Directs) -> None:
    code, text = direct().failure("hello", system_prompt="refuse this")
    assert code == "cli_error" and "systemPrompt refused" in text


# --- limits of the plan ---

ALLOWED = {
    "status": "allowed", "resetsAt": RESET, "rateLimitType": "five_hour",
    "overageStatus": "rejected", "overageDisabledReason": "org_level_disabled",
    "isUsingOverage": False,
}
REJECTED = {**ALLOWED, "status": "rejected"}
OTHER_429 = {"status": "rejected", "isUsingOverage": False}
BUSY: Dict[str, Any] = {
    "said": "rate_limit",
    "api_error_status": 429,
    "result": "API Error: Server is temporarily limiting requests (not your usage limit)",
}


def test_plan_limits_reported_by_the_cli_are_passed_on(direct: Directs, clock: FakeClock) -> None:
    d = direct(clock=clock)
    warned = {
        **ALLOWED, "status": "allowed_warning", "utilization": 0.9, "overageStatus": "allowed",
        "isUsingOverage": True,
    }
    assert d.run(script({"limits": ALLOWED}, {"delta": "fine"}, {"limits": warned})).text == "fine"
    assert [
        (limits.is_used_up, limits.is_using_overage, limits.resets_at) for limits in d.limits
    ] == [(False, False, RESET), (False, True, RESET)]
    assert [limits.windows[0] for limits in d.limits] == [
        cab.RateLimitWindow("five_hour", "allowed", None, RESET, clock.at),
        cab.RateLimitWindow("five_hour", "allowed_warning", 0.9, RESET, clock.at),
    ]
    assert [(limits.windows[1].kind, limits.windows[1].status) for limits in d.limits] == [
        ("overage", "rejected"), ("overage", "in_use"),
    ]


@pytest.mark.parametrize(
    "reported, fields, code, resets_at",
    [
        (REJECTED, LIMIT_REACHED, "usage_limit", RESET),
        # Its text names a time, which is never parsed.
        (None, LIMIT_REACHED, "usage_limit", None),
        (REJECTED, {**LIMIT_REACHED, "result": "API Error: 429 odd"}, "usage_limit", RESET),
        (OTHER_429, BUSY, "overloaded", None),
        (None, BUSY, "overloaded", None),
    ],
)
def test_a_plan_refusal_is_recognized_by_its_event(
    direct: Directs,
    reported: Optional[Mapping[str, Any]],
    fields: Mapping[str, Any],
    code: str,
    resets_at: Optional[float],
) -> None:
    d = direct()
    failed = d.failed(script(*([{"limits": reported}] if reported else []), {"fail": fields}))
    assert (failed.code, failed.resets_at, str(failed)) == (code, resets_at, fields["result"])
    assert [limits.is_used_up for limits in d.limits] == (
        [reported is REJECTED] if reported else []
    )


def test_a_reset_time_reported_in_an_earlier_turn_counts(direct: Directs) -> None:
    # The CLI reports the limits again only when they change.
    d, refused = direct(), script({"fail": LIMIT_REACHED})
    d.talk("one", script({"limits": ALLOWED}, {"delta": "fine"}))
    assert d.failed(refused, work={"conversation": "one"}).resets_at == RESET
    # A different process, which received no limits.
    assert d.failed(refused).resets_at is None


def test_a_request_that_the_plan_refuses_waits_for_it(bridge: Bridges) -> None:
    b = bridge()
    resets_at = int(time.time()) + 3600
    request = b.admin.ask(
        script({"limits": {**REJECTED, "resetsAt": resets_at}}, {"fail": LIMIT_REACHED})
    )
    body = wait_until(lambda: "waitingFor" in b.admin.poll(request) and b.admin.poll(request))
    assert (body["status"], body["waitingFor"], body["attempts"]) == ("queued", "usage_limit", 0)
    assert body["resumesAt"] == cab.iso_time(resets_at) and "error" not in body


# --- an overloaded service ---


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try an overloaded request again at once."""
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))


def overloaded_once(mark: Path, *deltas: str) -> str:
    """Return a prompt that fails after these deltas; the next process answers it with "whole"."""
    fails = [*({"delta": text} for text in deltas), {"fail": OVERLOADED}]
    return script({"first": str(mark), "do": fails}, {"delta": "who"}, {"delta": "le"})


@pytest.mark.parametrize("spare, deltas", [(0, ()), (1, ()), (1, ("half an ", "answer"))])
def test_an_overloaded_run_ends_at_once_and_the_next_try_gets_a_new_process(
    direct: Directs, tmp_path: Path, spare: int, deltas: Tuple[str, ...]
) -> None:
    d = direct(spare=spare)
    d.pool.maintain()
    live = cab.LiveText()
    prompt = overloaded_once(tmp_path / "mark", *deltas)
    assert d.failure(prompt, live=live) == ("overloaded", OVERLOADED["result"])
    assert (live.read(), live.generation, live.current_pause) == ("".join(deltas), 0, None)
    assert len(pids_of(d.fake, prompt)) == 1
    # The text of the first try is not part of it, even if nobody has discarded it.
    assert d.run(prompt, live=live).text == live.read() == "whole"
    assert live.generation == bool(deltas)
    first, second = pids_of(d.fake, prompt)
    assert first != second


@pytest.mark.parametrize("tools", ["none", "read"])
@pytest.mark.parametrize("warm_seconds", [0, 600])
def test_an_overloaded_turn_is_replayed_and_never_resumed(
    talk: Talks, soon: None, tmp_path: Path, warm_seconds: int, tools: str
) -> None:
    t, prompt = talk(tools, warm_seconds=warm_seconds), overloaded_once(tmp_path / "mark", "half")
    t.say("one")
    assert t.say(prompt) == "whole"
    first, second = pids_of(t.fake, prompt)
    assert first != second and not session_in(argv_of(t.fake, second), "--resume")
    if warm_seconds:
        assert first in pids_of(t.fake, "one")
    else:
        assert bool(session_in(argv_of(t.fake, first), "--resume")) == (tools == "read")
    # The failed turn is not in it twice.
    assert t.get_state()[:3] == ["one", "Echo: one", prompt]


def test_an_overloaded_first_turn_restarts_its_conversation(
    talk: Talks, soon: None, tmp_path: Path
) -> None:
    t, prompt = talk("read", warm_seconds=0), overloaded_once(tmp_path / "mark")
    assert t.say(prompt) == "whole"
    first, second = (
        session_in(argv_of(t.fake, pid), "--session-id") for pid in pids_of(t.fake, prompt)
    )
    assert first and second and first != second
    t.say("next")
    resumed = [session_in(start["argv"], "--resume") for start in t.fake.children()]
    assert second in resumed and first not in resumed


@pytest.mark.parametrize(
    "status, code",
    [
        (529, "overloaded"), (429, "overloaded"), (None, "network"), (502, "network"),
        (409, "timeout"),
    ],
)
def test_a_run_that_times_out_while_the_cli_retries_fails_for_the_reason_of_the_retry(
    direct: Directs, gate: Path, monkeypatch: pytest.MonkeyPatch, status: Any, code: str
) -> None:
    clock = Skipped()
    skip_time(monkeypatch, clock, "retry", None)
    d = direct(clock=clock, run_seconds=300, silence_seconds=9000)
    live = cab.LiveText()
    reasons = []
    prompt = script({"retry": status}, {"wait": str(gate)})

    def note_reason() -> None:
        reasons.append(live.current_pause and live.current_pause.reason)

    failed = d.failed(prompt, live=live, stop_reason=note_reason)
    assert (failed.code, failed.is_of_model) == (code, code == "overloaded")
    assert set(reasons) == ({None} if code == "timeout" else {None, code})
    assert len(pids_of(d.fake, prompt)) == 1


def test_a_run_is_no_longer_overloaded_after_the_cli_answers_again(
    direct: Directs, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Skipped()
    skip_time(monkeypatch, clock, "delta", None)
    d, live = direct(clock=clock, run_seconds=300, silence_seconds=9000), cab.LiveText()
    prompt = script({"retry": 529}, {"message": True}, {"delta": "x"}, {"wait": str(gate)})
    assert d.failure(prompt, live=live)[0] == "timeout"
    assert live.current_pause is None


# --- billing ---


def test_a_run_billed_to_an_api_key_is_stopped(bridge: Bridges, fake_claude: Fakes) -> None:
    fake = fake_claude()
    b = bridge(claude=fake)
    body = b.admin.answer("apikey")
    assert (body["status"], body["errorCode"]) == ("error", "billing_guard")
    assert "ANTHROPIC_API_KEY" in body["error"]
    assert "partial" not in body and "response" not in body
    assert not is_running(pids_of(fake, "apikey")[0])
    assert not [
        path for path in b.data_dir.glob("bridge.db*") if b"this was billed" in path.read_bytes()
    ]


def test_a_run_billed_to_an_api_key_is_stopped_without_grace(
    direct: Directs, fake_claude: Fakes, tmp_path: Path
) -> None:
    billed = """import os, signal
def hang(self, rest):
    signal.signal(signal.SIGTERM, lambda *_: (open(%r, "w"), os._exit(0)))
    self.begin("ANTHROPIC_API_KEY")
    signal.pause()
fake_claude.Fake.act_hang = hang""" % str(tmp_path / "asked")
    assert direct(twist(fake_claude(), billed)).failure("hang")[0] == "billing_guard"
    assert not (tmp_path / "asked").exists()


def test_an_api_key_may_be_billed_when_the_owner_allows_it(direct: Directs) -> None:
    assert direct(allow_api_key=True).run("apikey").text == "this was billed"


@pytest.mark.parametrize("allowed", [False, True])
def test_the_environment_of_a_claude_process_holds_no_secret_of_the_bridge(
    direct: Directs, allowed: bool
) -> None:
    environ = {
        "ANTHROPIC_API_KEY": "key", "CAB_TOKEN": "cab-x", "CAB_PORT": "1",
        "ANTHROPIC_MODEL": "opus", "CLAUDECODE": "1", "NODE_OPTIONS": "-r x",
        "CLAUDE_CODE_OAUTH_TOKEN": "oat", "HTTPS_PROXY": "http://proxy", "LANG": "C.UTF-8",
    }
    d = direct(detect=True, environ=environ, allow_api_key=allowed)
    received: Dict[str, str] = json.loads(d.run("env").text)
    passed_on = {"CLAUDE_CODE_OAUTH_TOKEN", "HTTPS_PROXY", "LANG"} | (
        {"ANTHROPIC_API_KEY"} if allowed else set()
    )
    assert {name for name in environ if name in received} == passed_on
    assert {name for name in received if name.startswith("CAB_")} == {"CAB_CHILD"}
    assert received["CAB_CHILD"].startswith("test")
    assert received["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"
    assert received["CLAUDE_CONFIG_DIR"] == str(d.data_dir / "claude-home")


# --- command line and folder ---


def test_nothing_of_a_request_is_in_argv_or_environment(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    client = bridge(claude=fake).admin.new_token("Secret-name", sessionMode="stateful")
    for text in ("Secret-one", "Secret-two"):
        client.answer(
            text, model="Secret-model", systemPrompt="Secret-system",
            jsonSchema={"title": "Secret-schema"}, conversation="Secret-talk", effort="low",
        )
    assert len(fake.prompts()) == 2 and "Secret" in json.dumps(fake.lines())
    assert "Secret" not in json.dumps(fake.starts())


def test_a_process_without_tools_works_in_an_empty_private_folder(direct: Directs) -> None:
    d = direct()
    d.run("hello")
    folder = Path(d.fake.children()[0]["cwd"])
    assert folder == d.data_dir.resolve() / "work" and list(folder.iterdir()) == []
    assert os.name == "nt" or folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "tools, exist, mode, allowed",
    [
        ("read", "Read,Glob,Grep", "dontAsk", ["mcp__api"]),
        ("web", "WebSearch,WebFetch", "dontAsk", ["WebSearch", "WebFetch"]),
        ("all", ",".join(cab.ALL_TOOLS), "acceptEdits", ["Bash", "WebFetch", "WebSearch"]),
        (
            ["Read", "Bash(git log:*)", "Write"], "Bash,Read,Write", "dontAsk",
            ["Bash(git log:*)", "Edit(./**)"],
        ),
    ],
)
def test_a_token_with_tools_gets_a_process_of_its_own_in_its_workspace(
    bridge: Bridges, fake_claude: Fakes, tools: Any, exist: str, mode: str, allowed: Any
) -> None:
    fake = fake_claude()
    b = bridge(claude=fake, spare=1)
    spare = spare_of(fake)
    b.admin.new_token("tooled", tools=tools).answer("hello")
    child = next(start for start in fake.children() if start["pid"] == pids_of(fake, "hello")[0])
    argv = child["argv"]
    assert argv[argv.index("--tools") + 1] == exist
    assert argv[argv.index("--permission-mode") + 1] == mode
    assert argv[argv.index("--allowedTools") + 1 :][: len(allowed)] == allowed
    assert child["cwd"] == next(
        token["workspace"]
        for token in b.admin.get("/api/tokens").json["tokens"]
        if token["name"] == "tooled"
    )
    assert child["pid"] != spare and is_running(spare)
    assert argv_of(fake, spare)[argv_of(fake, spare).index("--tools") + 1] == ""


# --- shutdown of processes ---

MUTE = """
run = fake_claude.Fake.run
fake_claude.Fake.act_mute = lambda self, rest: self.delta("thinking")
fake_claude.Fake.run = lambda self: (run(self), open(self.folder + "/left", "w").close())[0]
"""


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a process that exits by itself enough time on a slow machine."""
    monkeypatch.setattr(cab, "SHUTDOWN_GRACE_SECONDS", 20.0)


def test_a_cancelled_run_is_interrupted_and_its_process_exits_by_itself(
    direct: Directs, fake_claude: Fakes, patient: None
) -> None:
    d, live = direct(twist(fake_claude(), MUTE)), cab.LiveText()
    code, text = d.failure(
        "mute", live=live, stop_reason=lambda: "cancelled" if live.read() else None
    )
    assert (code, text.endswith(".")) == ("cancelled", True)
    assert [
        line["request"]["subtype"] for line in d.fake.lines() if line["type"] == "control_request"
    ] == ["initialize", "interrupt"]
    assert (d.fake.folder / "left").exists()


def test_an_answered_run_is_not_interrupted(direct: Directs, fake_claude: Fakes) -> None:
    d = direct(twist(fake_claude(), MUTE))
    d.run("hello")
    d.wait_for_end(*pids_of(d.fake, "hello"))
    assert [
        line["request"]["subtype"] for line in d.fake.lines() if line["type"] == "control_request"
    ] == ["initialize"]
    # It exited by itself.
    assert (d.fake.folder / "left").exists()


def test_no_run_waits_for_an_unresponsive_process_and_it_is_killed_soon(direct: Directs) -> None:
    d, live, stop_sequences = direct(), cab.LiveText(), []

    def cancel() -> Optional[str]:
        if live.read():
            stop_sequences.append(time.monotonic())
        return "cancelled" if stop_sequences else None

    with pytest.raises(cab.RunFailed):
        d.run("stubborn", cancel, live=live)
    assert time.monotonic() - stop_sequences[0] < 10
    assert is_running(pids_of(d.fake, "stubborn")[0])
    assert d.pool.is_busy
    d.wait_for_end(*pids_of(d.fake, "stubborn"))
    assert not d.pool.is_busy


def test_a_cancelled_request_makes_way_for_the_next_one(
    bridge: Bridges, fake_claude: Fakes, hasty: None
) -> None:
    fake = fake_claude()
    b = bridge(claude=fake)
    request = b.admin.ask("stubborn")
    waiting = b.admin.ask("next")
    pid = wait_until(lambda: b.admin.poll(request).get("partial") and pids_of(fake, "stubborn"))[0]
    assert b.admin.delete("/api/ask/" + request).json["errorCode"] == "cancelled"
    assert b.admin.done(waiting)["response"] == "Echo: next"
    # Nothing runs any more: the idle worker reaps it.
    wait_until(lambda: not is_running(pid))


@only_linux
def test_processes_started_by_a_tool_end_soon_after_a_cancelled_run(
    direct: Directs, tmp_path: Path
) -> None:
    d, note = direct(), tmp_path / "pid"
    prompt = "grandchild %s" % note
    with pytest.raises(cab.RunFailed, match="cancelled"):
        d.run(
            prompt, lambda: "cancelled" if note.exists() else None, tools="all",
            workspace=str(tmp_path),
        )
    grandchild = int(note.read_text())
    assert is_running(grandchild)
    d.wait_for_end(pids_of(d.fake, prompt)[0], grandchild)


@only_linux
@pytest.mark.parametrize("way", ["http", "command"])
def test_revoking_a_token_ends_its_run_and_the_processes_of_its_tools(
    bridge: Bridges, fake_claude: Fakes, tmp_path: Path, hasty: None, way: str
) -> None:
    fake, note = fake_claude(), tmp_path / "pid"
    b = bridge(claude=fake)
    b.admin.new_token("tooled", tools="all").ask("grandchild %s" % note)
    waiting = b.admin.ask("next")
    wait_until(note.exists)
    child, grandchild = pids_of(fake, "grandchild %s" % note)[0], int(note.read_text())
    token_id = next(
        token["id"]
        for token in b.admin.get("/api/tokens").json["tokens"]
        if token["name"] == "tooled"
    )
    if way == "http":
        assert b.admin.delete("/api/tokens/" + token_id).status == 200
    else:
        assert run_cli("token", "revoke", token_id, "--data-dir", str(b.data_dir)).returncode == 0
    wait_until(lambda: not is_running(child) and not is_running(grandchild))
    assert b.admin.done(waiting)["response"] == "Echo: next"


@only_linux
def test_ending_one_process_leaves_the_others_running(direct: Directs, tmp_path: Path) -> None:
    d = direct()
    d.talk("tooled", "first", tools="all", workspace=str(tmp_path))
    for _ in range(8):
        d.run("hello")
    d.talk("plain", "tenth")
    first, last = pids_of(d.fake, "first")[0], pids_of(d.fake, "tenth")[0]
    # With other tools the old process no longer fits.
    d.talk("tooled", "again", tools="read", workspace=str(tmp_path))
    d.wait_for_end(first)
    assert is_running(last)


@only_linux
def test_close_ends_every_process_even_unresponsive_ones(
    direct: Directs, fake_claude: Fakes
) -> None:
    deaf = (
        "import signal, time\nrun = fake_claude.Fake.run\n"
        "fake_claude.Fake.run = lambda self: (run(self), time.sleep(60))[0]\n"
    )
    d = direct(
        twist(fake_claude(), deaf + "signal.signal(signal.SIGTERM, signal.SIG_IGN)"), spare=2
    )
    d.prepare()
    d.talk("one", "hello")
    d.prepare()
    d.talk("two", "hello")
    d.prepare()
    assert len(d.fake.children()) == 4
    began = time.monotonic()
    d.pool.close()
    assert not [child for child in d.fake.children() if is_running(child["pid"])]
    assert time.monotonic() - began < 10


# --- conversations ---


class Talk:
    """The client of a stateful token. With tools the CLI keeps its session."""

    def __init__(self, fake: FakeClaude, bridge: RunningBridge, tools: str = "none") -> None:
        self.fake, self.bridge = fake, bridge
        self.client = bridge.admin.new_token("talk", sessionMode="stateful", tools=tools)

    def say(self, message: str, **fields: Any) -> str:
        body = self.client.answer(message, **fields)
        assert body["status"] == "completed", body
        return str(body["response"])

    def get_state(self, **fields: Any) -> List[str]:
        """Return the texts that the CLI has, in order, without the turns of this very question."""
        return [
            text
            for _, text in json.loads(self.say("turns", **fields))
            if not text.startswith(("turns", "["))
        ]

    def argv(self, message: str) -> List[str]:
        """Return the command line of the process that received this prompt last."""
        return argv_of(self.fake, pids_of(self.fake, message)[-1])


@pytest.fixture
def talk(bridge: Bridges, fake_claude: Fakes) -> Talks:
    def begin(tools: str = "none", **settings: Any) -> Talk:
        fake = fake_claude()
        return Talk(fake, bridge(claude=fake, **{"spare": 0, **settings}), tools)

    return begin


def session_in(argv: List[str], flag: str) -> Optional[str]:
    return next((word.partition("=")[2] for word in argv if word.startswith(flag + "=")), None)


@pytest.mark.parametrize("tools", ["none", "read"])
def test_the_turns_of_a_conversation_share_a_process(talk: Talks, tools: str) -> None:
    t = talk(tools)
    t.say("one")
    t.say("two")
    assert t.get_state() == ["one", "Echo: one", "two", "Echo: two"]
    assert len(t.fake.children()) == 1


def test_another_model_resumes_the_session_in_a_new_process(talk: Talks) -> None:
    t = talk("read")
    t.say("one")
    assert t.get_state(model="haiku") == ["one", "Echo: one"]
    session_id = session_in(t.argv("one"), "--session-id")
    assert session_in(t.argv("turns"), "--resume") == session_id is not None
    wait_until(lambda: not is_running(pids_of(t.fake, "one")[0]))


def test_a_conversation_without_tools_has_no_session_and_another_model_gets_a_replay(
    talk: Talks,
) -> None:
    t = talk()
    t.say("one")
    assert t.get_state(model="haiku") == ["one", "Echo: one"]
    for message in ("one", "turns"):
        argv = t.argv(message)
        assert "--no-session-persistence" in argv
        assert not session_in(argv, "--session-id") and not session_in(argv, "--resume")
    wait_until(lambda: not is_running(pids_of(t.fake, "one")[0]))


def test_a_conversation_without_a_warm_process_is_resumed_under_the_same_id(talk: Talks) -> None:
    t = talk("read", warm_seconds=0)
    t.say("one")
    t.say("two")
    assert t.get_state() == ["one", "Echo: one", "two", "Echo: two"]
    session_id = session_in(t.argv("one"), "--session-id")
    assert session_id
    assert [session_in(t.argv(message), "--resume") for message in ("two", "turns")] == [
        session_id
    ] * 2


def test_the_process_of_a_conversation_exits_when_its_time_is_over(
    direct: Directs, clock: FakeClock
) -> None:
    d = direct(clock=clock, warm_seconds=600)
    d.talk("one", "hello")
    pid = pids_of(d.fake, "hello")[0]
    clock.advance(599)
    d.pool.maintain()
    assert d.talk("one", "turns").text == '[["user", "hello"], ["assistant", "Echo: hello"]]'
    assert pids_of(d.fake, "turns") == [pid]
    clock.advance(600)
    d.pool.maintain()
    wait_until(lambda: not is_running(pid))


SLOW_TO_LEAVE = """
import os, time
run = fake_claude.Fake.run
def slow(self):
    if self.resumes:
        with open(self.folder + "/saw", "w") as saw:
            saw.write("gone" if os.path.exists(self.folder + "/gone") else "there")
    status = run(self)
    time.sleep(0.3)
    open(self.folder + "/gone", "w").close()
    return status
fake_claude.Fake.run = slow
"""


def test_two_processes_never_hold_one_session(
    direct: Directs, fake_claude: Fakes, patient: None, tmp_path: Path
) -> None:
    d = direct(twist(fake_claude(), SLOW_TO_LEAVE))
    tooled = {"tools": "read", "workspace": str(tmp_path)}
    first = d.talk("one", "hello", **tooled)
    work = {"conversation": "one", "session_id": first.session_id}
    d.run("again", work=work, model="haiku", **tooled)
    assert (d.fake.folder / "saw").read_text() == "gone"


@pytest.mark.parametrize("spare", [0, 1])
def test_a_conversation_that_the_cli_lost_is_replayed_from_then_on(talk: Talks, spare: int) -> None:
    t = talk("read", warm_seconds=0, spare=spare)
    t.say("one")
    t.say("two")
    for transcript in t.fake.folder.glob("session-*.json"):
        transcript.unlink()
    assert t.get_state() == ["one", "Echo: one", "two", "Echo: two"]
    t.say("three")
    assert t.get_state() == ["one", "Echo: one", "two", "Echo: two", "three", "Echo: three"]
    resumed = [start["pid"] for start in t.fake.children() if session_in(start["argv"], "--resume")]
    # The second attempt to resume found no session; there is no third.
    assert len(resumed) == 2 and resumed[0] == pids_of(t.fake, "two")[0]


def test_conversations_share_neither_process_nor_memory(talk: Talks) -> None:
    t = talk(spare=1)
    other = Talk(t.fake, t.bridge)
    t.say("one")
    t.say("two", conversation="second")
    other.say("three")
    assert (t.get_state(), t.get_state(conversation="second"), other.get_state()) == (
        ["one", "Echo: one"], ["two", "Echo: two"], ["three", "Echo: three"],
    )
    assert len({pids_of(t.fake, message)[0] for message in ("one", "two", "three")}) == 3


def test_only_so_many_conversations_stay_warm(talk: Talks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "MAX_KEPT_PROCESSES", 2)
    t = talk()
    names = ("a", "b", "c", "d")
    for name in names:
        t.say(name, conversation=name)
    pids = [pids_of(t.fake, name)[0] for name in names]
    wait_until(lambda: [is_running(pid) for pid in pids] == [False, False, True, True])
    assert t.get_state(conversation="a") == ["a", "Echo: a"]


@pytest.mark.parametrize("fault", [error(result="It broke"), "die 1", "garbage"])
def test_a_failed_turn_is_not_part_of_the_conversation(talk: Talks, fault: str) -> None:
    t = talk()
    t.say("one")
    assert t.client.answer(fault)["status"] == "error"
    assert t.get_state() == ["one", "Echo: one"]


def test_a_held_turn_that_is_cancelled_is_not_part_of_the_conversation(talk: Talks) -> None:
    clock = Skipped()
    t = talk(clock=clock)
    t.say("one")
    request = t.client.ask(error(result="Not logged in"))
    body = wait_until(lambda: "waitingFor" in t.client.poll(request) and t.client.poll(request))
    assert (body["status"], body["waitingFor"], body["attempts"]) == ("queued", "login", 0)
    assert t.client.delete("/api/ask/" + request).status == 200
    clock.ahead = cab.LOGIN_RETRY_SECONDS
    assert t.get_state() == ["one", "Echo: one"]


def test_a_cancelled_turn_is_not_part_of_the_conversation(talk: Talks, gate: Path) -> None:
    t = talk()
    t.say("one")
    request = t.client.ask("hold %s" % gate)
    wait_until(lambda: t.client.poll(request).get("partial"))
    assert t.client.delete("/api/ask/" + request).status == 200
    wait_until(lambda: "cancelled" in t.bridge.log[-1])
    gate.touch()
    assert t.get_state() == ["one", "Echo: one"]


def test_the_process_of_a_conversation_ends_with_it_even_while_another_request_runs(
    talk: Talks, gate: Path
) -> None:
    t = talk()
    t.say("one")
    t.say("two", conversation="other")
    token_id = next(
        token["id"]
        for token in t.bridge.admin.get("/api/tokens").json["tokens"]
        if token["name"] == "talk"
    )
    keeper = Talk(t.fake, t.bridge)
    keeper.say("kept")
    keeper.say("dropped", conversation="trip")
    t.bridge.admin.ask("hold %s" % gate)
    pids = {name: pids_of(t.fake, name)[0] for name in ("one", "two", "kept", "dropped")}
    wait_until(lambda: pids_of(t.fake, "hold %s" % gate))
    assert keeper.client.delete("/api/conversations/trip").status == 200
    assert t.bridge.admin.delete("/api/tokens/" + token_id).status == 200
    wait_until(lambda: [name for name, pid in pids.items() if is_running(pid)] == ["kept"])


# --- detection of claude ---

ACCOUNT = (
    "accountUuid", "organizationUuid", "billingType", "accountCreatedAt", "subscriptionCreatedAt",
    "ccOnboardingFlags",
)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"version": "2.1.196 (Claude Code)"}, "2.1.196 (Claude Code) is too old"),
        ({"version": "2.0.999 (Claude Code)"}, "needs 2.1.197 or newer"),
        ({"version": "1.9.999 (Claude Code)"}, "too old"),
        ({"flags": "--tools --resume"}, ", --input-format, "),
        ({"version": "hello"}, "does not answer like Claude Code"),
        ({"auth": {"loggedIn": False}}, "not signed in"),
        ({"auth": {}}, "not signed in"),
    ],
)
def test_an_unusable_claude_is_refused_at_the_start(
    direct: Directs, fake_claude: Fakes, options: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(cab.CannotStart, match=r"^[^\n]+\.$") as caught:
        direct(fake_claude(**options), detect=True)
    assert words in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("flag", sorted(cab.NEEDED_FLAGS))
def test_a_claude_that_lacks_one_needed_flag_is_refused_and_never_started(
    direct: Directs, fake_claude: Fakes, flag: str
) -> None:
    fake = fake_claude(flags=" ".join(set(FLAGS.split()) - {flag}))
    with pytest.raises(cab.CannotStart, match=r"^[^\n]+ lacks %s\.$" % flag) as caught:
        direct(fake, detect=True)
    assert "claude update" in caught.value.hint and "2.1.197" in caught.value.hint
    assert fake.children() == []


def test_the_oldest_supported_claude_with_only_the_needed_flags_is_used(
    direct: Directs, fake_claude: Fakes
) -> None:
    fake = fake_claude(version="2.1.197 (Claude Code)", flags=" ".join(cab.NEEDED_FLAGS))
    d = direct(fake, detect=True)
    assert d.run("hello", effort="low").text == "Echo: hello"
    flags = {word for word in d.fake.children()[0]["argv"] if word.startswith("--")}
    # The start does not check for the last three.
    assert flags <= cab.NEEDED_FLAGS | {"--output-format", "--verbose", "--allowedTools"}


def test_an_effort_as_a_flag_does_not_make_the_cli_keep_the_session(
    direct: Directs, fake_claude: Fakes
) -> None:
    flags = " ".join([*cab.NEEDED_FLAGS, "--effort"])
    d = direct(fake_claude(version="2.1.197 (Claude Code)", flags=flags), detect=True)
    assert d.run("hello", effort="low").text == "Echo: hello"
    argv = d.fake.children()[0]["argv"]
    assert argv[argv.index("--effort") + 1] == "low" and "--no-session-persistence" in argv


def test_a_login_in_the_owners_settings_is_used_with_a_note(
    direct: Directs, fake_claude: Fakes, tmp_path: Path
) -> None:
    (tmp_path / ".claude").mkdir()
    fake = twist(
        fake_claude(auth={"loggedIn": True, "subscriptionType": "pro"}),
        "import os\nif 'auth' in sys.argv and 'CLAUDE_CONFIG_DIR' in os.environ:\n    sys.exit(1)",
    )
    d = direct(fake, detect=True)
    assert d.install.billing_account == "Claude Pro subscription"
    assert "settings folder" in d.install.notes[-1]
    assert "CLAUDE_CONFIG_DIR" not in json.loads(d.run("env").text)


def test_the_account_is_passed_on_without_the_owners_address(
    direct: Directs, tmp_path: Path
) -> None:
    account = {name: "value of " + name for name in ACCOUNT}
    (tmp_path / ".claude.json").write_text(
        json.dumps(
            {
                "oauthAccount": {
                    **account,
                    "emailAddress": "ann@example.org",
                    "displayName": "Ann",
                },
                "projects": {"/home/ann": {}},
            }
        )
    )
    written = (direct(detect=True).data_dir / "claude-home" / ".claude.json").read_text()
    assert "ann" not in written.lower()
    assert {name: json.loads(written)["oauthAccount"][name] for name in account} == account


def test_an_account_that_cannot_be_passed_on_does_not_stop_the_start(
    direct: Directs, tmp_path: Path
) -> None:
    account = dict.fromkeys(ACCOUNT, "x")
    (tmp_path / ".claude.json").write_text(json.dumps({"oauthAccount": account}))
    (tmp_path / "data" / "claude-home" / ".claude.json.part").mkdir(parents=True)
    assert direct(detect=True).run("hello").text == "Echo: hello"


def test_a_claude_that_reports_api_key_billing_at_the_start_gets_no_prompt(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = fake_claude(auth={"loggedIn": True, "apiKeySource": "/login managed key"})
    body = bridge(fake).admin.answer("hello")
    assert body["errorCode"] == "billing_guard"
    assert "/login managed key" in body["error"]
    assert fake.prompts() == []


# --- processes of the operating system ---


def in_thread(name: str, action: Callable[[], Any]) -> Any:
    """Run an action in a thread with this name; return its result or its exception."""
    results: List[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as exception:
            results.append(exception)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join(20)
    return results[0]


def test_a_process_is_started_only_by_the_worker_or_the_main_thread(
    direct: Directs, tmp_path: Path
) -> None:
    d = direct()
    argv = cab.claude_argv(d.install.command, d.install.features, cab.Tools.NONE)

    def start() -> bool:
        process = cab.ClaudeProcess(argv, tmp_path, d.install.environment, "test")
        was_alive = process.is_alive
        process.stop()
        return was_alive

    assert isinstance(in_thread("helper", start), AssertionError)
    assert d.fake.starts() == []
    assert in_thread("worker", start) is True
    assert start() is True


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_ps_runs_with_a_fixed_locale_and_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps = tmp_path / "ps"
    ps.write_text('#!/bin/sh\necho "$@"\nenv\n')
    ps.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    for name, value in (("LC_ALL", "de_DE.UTF-8"), ("TZ", "Asia/Tokyo"), ("OTHER", "stays")):
        monkeypatch.setenv(name, value)
    arguments, *environment = cab.run_ps("-o", "lstart=", "-p", "1").splitlines()
    assert arguments == "-o lstart= -p 1"
    assert {"LC_ALL=C", "TZ=UTC", "OTHER=stays"} <= set(environment)
    assert str(cab.ps_field(7, "lstart")).startswith("-o lstart= -p 7\n")


# --- a batch file that stands before the program, as npm installs it on Windows ---


NPM_SCRIPT = (
    'endLocal & goto #_undefined_# 2>NUL || title %COMSPEC% & "%_prog%" --no-warnings '
    ' "%dp0%\\node_modules\\claude\\cli.js" %*'
)
NPM_PROGRAM = 'CALL :find_dp0\n"%dp0%\\node_modules\\claude\\claude.exe"   %*'
PNPM = (
    '@IF EXIST "%~dp0\\node.exe" (\n  "%~dp0\\node.exe"  "%~dp0\\node_modules\\claude\\cli.js" %*\n'
    ') ELSE (\n  node  "%~dp0\\node_modules\\claude\\cli.js" %*\n)'
)


@pytest.mark.parametrize(
    "text, words",
    [
        (NPM_SCRIPT, ["NODE", "--no-warnings", "cli.js"]),
        (NPM_PROGRAM, ["claude.exe"]),
        (PNPM, ["NODE", "cli.js"]),
        ('@"%~dp0\\node_modules\\claude\\cli.js" %*', ["claude.CMD"]),
        ('@node --import x "%~dp0\\node_modules\\claude\\cli.js" %*', ["claude.CMD"]),
        ('@"%~dp0\\node_modules\\claude\\gone.exe" %*', ["claude.CMD"]),
    ],
)
def test_what_a_package_managers_batch_file_runs_is_run_directly(
    text: str, words: List[str], tmp_path: Path
) -> None:
    folder = tmp_path / "folder with blanks"
    package = folder / "node_modules" / "claude"
    package.mkdir(parents=True)
    node = folder / ("node.exe" if os.name == "nt" else "node")
    for path in (node, package / "cli.js", package / "claude.exe"):
        path.touch(0o755)
    shim = folder / "claude.CMD"
    shim.write_text(text)
    places = {"NODE": node, "cli.js": package / "cli.js", "claude.exe": package / "claude.exe"}
    expected = [str(places.get(word, shim if word == shim.name else word)) for word in words]
    found = cab.program_behind(shim, "")
    assert [os.path.normcase(word) for word in found] == list(map(os.path.normcase, expected))


@pytest.mark.parametrize("sign", list("%&|<>^!"))
def test_a_rule_that_cmd_exe_would_change_is_refused_where_a_batch_file_runs(
    sign: str, bridge: Callable[..., RunningBridge], fake_claude: Callable[..., FakeClaude]
) -> None:
    claude = fake_claude()
    claude.path = claude.path.rename(claude.folder / "claude.cmd")
    running = bridge(claude=claude)
    token = running.admin.new_token(tools=["Bash(echo a%sb:*)" % sign, "Read"])
    body = token.answer("hello")
    assert body["errorCode"] == "cli_error"
    assert "Bash(echo a%sb:*)" % sign in body["error"] and "cmd.exe" in body["error"]
    assert claude.children() == []
    answer = running.admin.new_token(tools=["Bash(git log:*)"]).answer("hello")
    assert answer["response"] == "Echo: hello"
