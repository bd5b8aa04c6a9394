"""Tests of the processes that hold a conversation: which one takes the next turn, and whether the
model receives exactly the turns that the client sent.

The fake logs the turns that it holds at each prompt.
"""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import Api, FakeClaude, FakeClock, RunningBridge, is_running, wait_until
from random_chats import Message, RandomChat, RandomChats, body_of
from test_formats import (
    BLUE,
    SCHEMA,
    chat_that_calls,
    continue_chat,
    post,
    streamed,
    talk,
    text,
    tools,
    words,
)
from test_processes import Direct, Talk, argv_of, direct, session_in, twist
from test_stream import Skipped, script

Fakes = Callable[..., FakeClaude]
Bridges = Callable[..., RunningBridge]
Directs = Callable[..., Direct]
Turns = List[Tuple[str, str]]
both = pytest.mark.parametrize("api", ["anthropic", "openai"])
__all__ = ["direct"]

# The fake logs its turns at each prompt that asks for an answer.
NOTED = """
import os
act = fake_claude.Fake.act
def noted(self, text):
    note = {"pid": os.getpid(), "turns": self.turns}
    with open(os.path.join(self.folder, "turns.jsonl"), "ab", 0) as log:
        log.write((fake_claude.dumps(note) + "\\n").encode())
    act(self, text)
fake_claude.Fake.act = noted
"""
# It does not go back, or its answer is of no use.
NO_REWIND = "fake_claude.Fake.rewind = lambda self, request: False"
REWIND_ELSEWHERE = """
rewind = fake_claude.Fake.rewind
def elsewhere(self, request):
    done = rewind(self, request)
    request["target_message_uuid"] = "another"
    return done
fake_claude.Fake.rewind = elsewhere
"""
REWIND_ERROR = """
control = fake_claude.Fake.control
def refusing(self, line):
    if line["request"]["subtype"] == "rewind_conversation":
        response = {"subtype": "error", "request_id": line["request_id"], "error": "unknown"}
        return self.say(type="control_response", response=response)
    control(self, line)
fake_claude.Fake.control = refusing
"""
REWIND_DEATH = """
import os
fake_claude.Fake.rewind = lambda self, request: os._exit(1)
"""
SILENT_REWIND = """
control = fake_claude.Fake.control
def silent(self, line):
    if line["request"]["subtype"] != "rewind_conversation":
        control(self, line)
fake_claude.Fake.control = silent
"""
# It ignores the messages that need no turn of their own.
NO_PIPE = """
read = fake_claude.Fake.read
def deaf(self):
    line = read(self)
    while line and "local_command_source" in line:
        line = read(self)
    return line
fake_claude.Fake.read = deaf
"""
# Every answer is a different one, with blanks around it.
UNIQUE = """
answer = fake_claude.Fake.answer
fake_claude.Fake.answer = lambda self, text: answer(
    self, "\\n%s #%s " % (text, os.urandom(4).hex()))
fake_claude.text_of = lambda line: "".join(
    block.get("text", "") for block in line["message"]["content"])
"""
# What a process receives that is warmed up, between its configuration and the first turn.
WARM_UP = [
    "told", *["assistant", "piped"] * cab.WARM_UP_PAIRS, "export_conversation",
    "rewind_conversation",
]


class Prompt(NamedTuple):
    """A prompt that reached the fake: in which process, and all turns up to it."""

    pid: int
    turns: Turns


def seen(fake: FakeClaude) -> List[Prompt]:
    return [
        Prompt(note["pid"], [(role, words) for role, words in note["turns"]])
        for note in fake._log("turns.jsonl")
    ]


def kinds(fake: FakeClaude, pid: int) -> List[str]:
    """Return what a process received, but for the limits of an answer.

    told: a message without an answer. piped: one that needs no turn.
    """
    names = []
    for entry in fake._log("lines.jsonl"):
        line = entry["line"]
        if entry["pid"] == pid:
            name = line["type"]
            if name == "control_request":
                name = line["request"]["subtype"]
            elif "local_command_source" in line:
                name = "piped"
            elif line.get("shouldQuery") is False:
                name = "told"
            if name != "apply_flag_settings":
                names.append(name)
    return names


def requests(fake: FakeClaude, subtype: str) -> List[Dict[str, Any]]:
    """Return the control requests of a kind."""
    return [
        line["request"]
        for line in fake.lines()
        if line["type"] == "control_request" and line["request"]["subtype"] == subtype
    ]


def user_ids(fake: FakeClaude) -> List[str]:
    """Return the ids of the lines with a message of the user, in order."""
    return [line["uuid"] for line in fake.lines() if line["type"] == "user"]


class Client:
    """A client of /v1 that keeps its conversation.

    options: of the body. turns: what it knows.
    """

    def __init__(
        self, fake: FakeClaude, admin: Api, api: str = "anthropic", system: str = "", **options: Any
    ) -> None:
        self.fake, self.admin, self.api = fake, admin, api
        self.system, self.options = system, options
        self.turns: Turns = []

    def copy(self, number: Optional[int] = None, **changes: Any) -> "Client":
        """Return a client with the same conversation, or with its first turns."""
        client = Client(self.fake, self.admin, self.api, self.system, **self.options)
        client.turns = self.turns[:number]
        for name, value in changes.items():
            setattr(client, name, value)
        return client

    def body(self, prompt: Any) -> Dict[str, Any]:
        body = talk(*(content for _, content in self.turns), prompt, **self.options)
        if self.system and self.api == "anthropic":
            body["system"] = self.system
        elif self.system:
            body["messages"].insert(0, {"role": "system", "content": self.system})
        return body

    def say(self, prompt: str, stream: bool = False) -> int:
        """Send a message; check that the model received the turns. -> the process."""
        count = len(seen(self.fake))
        answer = post(self.admin, self.api, {**self.body(prompt), "stream": stream})
        words_of_answer = streamed(answer.data) if stream else words(answer)
        expected = [*self.turns, ("user", prompt)]
        self.turns = [*expected, ("assistant", words_of_answer)]
        (reached,) = seen(self.fake)[count:]
        assert [(role, said.strip()) for role, said in reached.turns] == [
            (role, said.strip()) for role, said in expected
        ]
        return reached.pid


def running(fake: FakeClaude) -> List[int]:
    return [child["pid"] for child in fake.children() if is_running(child["pid"])]


@pytest.fixture
def fake(fake_claude: Fakes) -> FakeClaude:
    return twist(fake_claude(), NOTED)


def exchanges(number: int, name: str = "q") -> Turns:
    """Return so many turns of user and assistant."""
    return [
        turn
        for n in range(number)
        for turn in (("user", "%s%d" % (name, n)), ("assistant", "answer %s%d" % (name, n)))
    ]


# --- a chat that grows ---


@both
@pytest.mark.parametrize("stream", [False, True])
def test_a_growing_chat_stays_in_one_process(
    bridge: Bridges, fake: FakeClaude, api: str, stream: bool
) -> None:
    running = bridge(fake)
    client = Client(fake, running.admin, api, "Be brief.")
    pids = {client.say(prompt, stream) for prompt in ("one", "say  two\n", "/three", "four")}
    assert len(pids) == len(fake.children()) == 1 and running.waiting() == list(pids)
    # Nothing was sent twice.
    assert kinds(fake, *pids) == ["initialize", "user", "user", "user", "user"]


@pytest.mark.parametrize(
    "said, copied, stays",
    [
        (" \n padded\t ", "padded", True),
        ("plain", "\n\nplain  ", True),
        ("two parts", [text("two "), text("parts")], True),
        ("two parts", [text("two parts"), text(" \n")], True),
        ("two parts", "two  parts", False),
        ("two parts", "two part", False),
        ("two parts", "Two parts", False),
        (" ", "", True),
        (" ", "(no answer)", True),
        ("(no answer)", " ", True),
        ("é\u2028\x00", "é\u2028\x00", True),
    ],
)
def test_only_blanks_around_the_copy_of_an_answer_do_not_matter(
    bridge: Bridges, fake: FakeClaude, said: str, copied: Any, stays: bool
) -> None:
    admin = bridge(fake).admin
    words(post(admin, "anthropic", talk("say " + said)))
    assert words(post(admin, "anthropic", talk("say " + said, copied, "on"))) == "Echo: on"
    first, second = seen(fake)
    assert (first.pid == second.pid) == stays
    if stays:
        assert second.turns[1] == ("assistant", said)


@pytest.mark.parametrize(
    "first, second, stays",
    [
        ("one", [text("one")], True),
        ("one", [text("on"), text("e")], False),
        ("one", " one", False),
        ("one", "one ", False),
    ],
)
def test_a_turn_of_the_user_must_be_the_same(
    bridge: Bridges, fake: FakeClaude, first: str, second: Any, stays: bool
) -> None:
    admin = bridge(fake).admin
    words(post(admin, "anthropic", talk(first)))
    words(post(admin, "anthropic", talk(second, "Echo: one", "two")))
    assert (seen(fake)[0].pid == seen(fake)[1].pid) == stays


def test_both_formats_continue_the_same_conversation(bridge: Bridges, fake: FakeClaude) -> None:
    client = Client(fake, bridge(fake).admin, "openai", "Be brief.")
    pid = client.say("one")
    client.api = "anthropic"
    assert client.say("two") == pid


def test_two_conversations_in_turn_keep_a_process_each(bridge: Bridges, fake: FakeClaude) -> None:
    running = bridge(fake)
    one, two = (Client(fake, running.admin) for _ in range(2))
    one.say("say hello")
    two.say("say goodbye")
    pids = [(one.say(prompt), two.say(prompt)) for prompt in ("a", "b", "c")]
    assert len(set(pids)) == 1 and len(set(pids[0])) == 2 == len(fake.children())


# --- back to an earlier turn ---


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_retry_takes_the_last_turn_back(
    bridge: Bridges, fake: FakeClaude, number: int
) -> None:
    client = Client(fake, bridge(fake).admin)
    for prompt in ("one", "two", "three")[: number + 1]:
        pid = client.say(prompt)
    again = client.copy(-2)
    assert [again.say(prompt), again.say("on")] == [pid, pid]
    last = user_ids(fake)[number]
    (rewind,) = requests(fake, "rewind_conversation")
    assert (rewind["target_message_uuid"], rewind["last_seen_user_message_uuid"]) == (last, last)
    assert len(fake.children()) == 1


def test_a_retry_of_a_retry_takes_the_new_turn_back(bridge: Bridges, fake: FakeClaude) -> None:
    client = Client(fake, bridge(fake).admin)
    pids = [client.say("one")]
    pids += [client.copy(2).say("two") for _ in range(3)]
    assert len(set(pids)) == 1
    targets = [request["target_message_uuid"] for request in requests(fake, "rewind_conversation")]
    assert targets == user_ids(fake)[1:3]


@both
@pytest.mark.parametrize("number", [1, 2])
def test_an_edited_turn_takes_back_all_after_it(
    bridge: Bridges, fake: FakeClaude, api: str, number: int
) -> None:
    client = Client(fake, bridge(fake).admin, api)
    for prompt in ("one", "two", "three", "four"):
        pid = client.say(prompt)
    edited = client.copy(2 * number)
    assert [edited.say("edited"), edited.say("on")] == [pid, pid]
    (rewind,) = requests(fake, "rewind_conversation")
    ids = user_ids(fake)
    assert rewind["target_message_uuid"] == ids[number]
    assert rewind["last_seen_user_message_uuid"] == ids[3]
    # The branch that was left is replayed.
    assert client.say("five") != pid


def test_an_edited_first_turn_is_another_conversation(bridge: Bridges, fake: FakeClaude) -> None:
    running = bridge(fake)
    client = Client(fake, running.admin)
    pid = client.say("one")
    assert client.copy(0).say("edited") != pid
    assert not requests(fake, "rewind_conversation") and client.say("two") == pid


def test_an_edited_answer_is_replayed(bridge: Bridges, fake: FakeClaude) -> None:
    client = Client(fake, bridge(fake).admin)
    client.say("one")
    pid = client.say("two")
    edited = client.copy()
    edited.turns[1] = ("assistant", "edited")
    other = edited.say("three")
    assert other != pid and edited.say("four") == other
    assert client.say("three") == pid


@pytest.mark.parametrize("is_last", [False, True])
def test_a_process_that_holds_no_more_than_the_conversation_is_preferred(
    bridge: Bridges, fake: FakeClaude, is_last: bool
) -> None:
    """Otherwise the longer one would lose its last turns."""
    longer = Client(fake, bridge(fake).admin)
    longer.turns = [
        ("user", "one"), ("assistant", "Echo: one"), ("user", "two"), ("assistant", "Echo: two"),
    ]
    pid = longer.say("three")
    # The second turn was piped, so that the process cannot go back to it.
    shorter = longer.copy(2)
    other = shorter.say("two")
    assert other != pid
    if is_last:
        assert longer.say("four") == pid
    assert shorter.say("another three") == other
    assert longer.say("five") == pid and not requests(fake, "rewind_conversation")[1:]


@pytest.mark.parametrize(
    "code", [NO_REWIND, REWIND_ELSEWHERE, REWIND_ERROR, REWIND_DEATH],
    ids=["refused", "elsewhere", "error", "death"],
)
def test_a_process_that_does_not_go_back_is_replaced(
    bridge: Bridges, fake: FakeClaude, code: str
) -> None:
    running = bridge(twist(fake, code))
    client = Client(fake, running.admin)
    client.say("one")
    pid = client.say("two")
    again = client.copy(2)
    other = again.say("two")
    assert other != pid and again.say("three") == other
    wait_until(lambda: not is_running(pid))
    assert running.waiting() == [other]


# --- who may continue ---


def test_two_tokens_never_share_a_process(bridge: Bridges, fake: FakeClaude) -> None:
    running = bridge(fake)
    clients = [Client(fake, running.admin.new_token(name)) for name in ("a", "b")]
    pids = [[client.say(prompt) for client in clients] for prompt in ("one", "two")]
    assert pids[0] == pids[1] and len(set(pids[0])) == 2
    # Neither does a token that knows the whole conversation, nor a retry.
    thief = clients[0].copy(admin=running.admin)
    assert thief.copy().say("three") not in pids[0]
    assert thief.copy(2).say("two") not in pids[0]
    assert [client.say("three") for client in clients] == pids[0]


def test_a_chat_and_a_stateful_conversation_of_one_token_never_share_a_process(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    stateful = running.admin.new_token(sessionMode="stateful")
    assert stateful.answer("one")["response"] == "Echo: one"
    client = Client(fake, stateful)
    client.turns = [("user", "one"), ("assistant", "Echo: one")]
    client.say("two")
    stateful.answer("two")
    first, chat, second = seen(fake)
    assert first.pid == second.pid != chat.pid
    assert second.turns[:2] == client.turns[:2]


CHANGES: List[Tuple[str, Dict[str, Any]]] = [
    ("system", {"system": "Be rude."}),
    ("model", {"options": {"model": "haiku"}}),
    ("tools", {"options": {"tools": tools("anthropic")}}),
    ("effort", {"options": {"output_config": {"effort": "low"}}}),
    (
        "schema",
        {"options": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}},
    ),
]


@pytest.mark.parametrize("changes", [fields for _, fields in CHANGES], ids=[n for n, _ in CHANGES])
def test_another_configuration_is_another_process(
    bridge: Bridges, fake: FakeClaude, changes: Mapping[str, Any]
) -> None:
    client = Client(fake, bridge(fake).admin, system="Be kind.")
    pid = client.say("one")
    other = client.copy(**changes).say("two")
    assert other != pid and client.say("two") == pid


def test_a_message_without_a_chat_takes_no_process_of_one(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    client = Client(fake, running.admin)
    pid = client.say("one")
    running.admin.answer("one")
    assert [reached.pid == pid for reached in seen(fake)] == [True, False]
    assert seen(fake)[1].turns == [("user", "one")] and running.waiting() == [pid]


# --- calls of the client's tools ---


@both
def test_the_loop_of_an_agent_and_the_next_question_stay_in_one_process(
    bridge: Bridges, fake: FakeClaude, api: str
) -> None:
    running = bridge(fake)
    body = chat_that_calls(api)
    for number in range(3):
        answer = post(running.admin, api, body)
        body = continue_chat(body, answer, "blue")
        answer = post(running.admin, api, body)
        assert json.loads(words(answer)) == BLUE
        question = "call " + json.dumps([["taste", {"n": number}]])
        body["messages"] += [
            {"role": "assistant", "content": words(answer)}, {"role": "user", "content": question},
        ]
    assert len(fake.children()) == 1 and len(running.waiting()) == 1
    assert not [line for line in fake.lines() if line["type"] == "assistant"]


def test_a_question_before_the_calls_is_edited_after_them(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    admin = running.admin
    body = talk("first", tools=tools("anthropic"))
    body["messages"].append({"role": "assistant", "content": words(post(admin, "anthropic", body))})
    before = list(body["messages"])
    body["messages"].append({"role": "user", "content": 'call [["look", {}]]'})
    body = continue_chat(body, post(admin, "anthropic", body), "blue")
    assert json.loads(words(post(admin, "anthropic", body))) == BLUE
    body["messages"] = [*before, {"role": "user", "content": "edited"}]
    assert words(post(admin, "anthropic", body)) == "Echo: edited"
    assert seen(fake)[-1].turns == [
        ("user", "first"), ("assistant", "Echo: first"), ("user", "edited"),
    ]
    assert len(fake.children()) == 1


# --- what is not kept ---

NOT_KEPT: List[Tuple[str, str, Dict[str, Any]]] = [
    (
        "structured", "say x",
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    (
        "forced tool", "say x",
        {"tools": tools("anthropic"), "tool_choice": {"type": "tool", "name": "look"}},
    ),
    (
        "stop sequence", script({"delta": "one STOP two"}), {"stop_sequences": ["STOP"]},
    ),
    ("two messages", script({"delta": "a"}, {"message": True}, {"delta": "b"}), {}),
    ("error", "error " + json.dumps({"result": "API Error: 400 odd"}), {}),
    ("death", "die 1", {}),
]


@pytest.mark.parametrize(
    "prompt, options", [row[1:] for row in NOT_KEPT], ids=[row[0] for row in NOT_KEPT]
)
def test_a_process_with_another_end_is_not_kept(
    bridge: Bridges, fake: FakeClaude, prompt: str, options: Mapping[str, Any]
) -> None:
    running = bridge(fake)
    post(running.admin, "anthropic", talk(prompt, **options))
    assert running.waiting() == []
    wait_until(lambda: not any(is_running(child["pid"]) for child in fake.children()))


def test_a_cancelled_turn_is_not_kept(bridge: Bridges, fake: FakeClaude, gate: Path) -> None:
    running = bridge(fake)
    client = Client(fake, running.admin)
    pid = client.say("one")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running.admin, "anthropic", client.body("hold %s" % gate))
        wait_until(lambda: len(seen(fake)) == 2)
        job_id = running.admin.get("/api/requests").json["requests"][0]["requestId"]
        assert running.admin.delete("/api/ask/" + job_id).status == 200
        assert answer.result().status != 200
    wait_until(lambda: not is_running(pid))
    assert running.waiting() == [] and client.say("two") != pid


def test_without_warm_seconds_every_turn_is_replayed(bridge: Bridges, fake: FakeClaude) -> None:
    running = bridge(fake, warm_seconds=0)
    client = Client(fake, running.admin)
    assert len({client.say(prompt) for prompt in ("one", "two", "three")}) == 3
    assert running.waiting() == []


# --- the end of a waiting process ---


def test_a_waiting_process_that_died_is_replaced(bridge: Bridges, fake: FakeClaude) -> None:
    client = Client(fake, bridge(fake).admin)
    client.say("one")
    pid = client.say("two")
    os.kill(pid, signal.SIGKILL)
    assert client.say("three") != pid


def test_a_waiting_process_that_does_not_react_is_replaced(
    bridge: Bridges, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "PREPARE_SECONDS", 0.3)
    client = Client(fake, bridge(fake).admin)
    client.say("one")
    pid = client.say("two")
    os.kill(pid, signal.SIGSTOP)
    assert client.say("three") != pid
    wait_until(lambda: not is_running(pid))


DIES_AT = """
import os
def dying(self, rest):
    mark = os.path.join(self.folder, "died")
    if not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(1)
    self.begin()
    self.answer("alive")
fake_claude.Fake.act_dying = dying
begin = fake_claude.Fake.begin
fake_claude.Fake.begin = lambda self, *args: (
    None if self.turns[-1][1] == "dying" and not args[1:] and not hasattr(self, "late")
    and setattr(self, "late", 1) is None else begin(self, *args))
"""


def test_a_waiting_process_that_dies_at_the_prompt_is_replaced(
    bridge: Bridges, fake: FakeClaude
) -> None:
    admin = bridge(twist(fake, DIES_AT)).admin
    pid = Client(fake, admin).say("one")
    answer = post(admin, "anthropic", talk("one", "Echo: one", "dying"))
    assert words(answer) == "alive"
    first, *others = seen(fake)
    assert [reached.pid == pid for reached in others] == [True, False]
    assert others[0].turns == others[1].turns


def test_a_waiting_process_expires(bridge: Bridges, fake: FakeClaude) -> None:
    clock = Skipped()
    running = bridge(fake, clock=clock, warm_seconds=600)
    client = Client(fake, running.admin)
    pid = client.say("one")
    clock.ahead += 590
    assert client.say("two") == pid
    clock.ahead += 600
    running.admin.answer("wake up")
    wait_until(lambda: not is_running(pid))
    assert client.say("three") != pid


def test_at_most_so_many_processes_wait_and_the_last_used_ones_stay(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    assert cab.MAX_KEPT_PROCESSES == 4
    clients = [Client(fake, running.admin) for _ in range(6)]
    pids = [client.say("one of %d" % n) for n, client in enumerate(clients[:4])]
    assert clients[0].say("more") == pids[0]
    pids += [client.say("one of %d" % n) for n, client in enumerate(clients[4:], 4)]
    expected = [pids[n] for n in (3, 0, 4, 5)]
    assert running.waiting() == expected
    wait_until(lambda: sum(map(is_running, pids)) == 4)
    assert clients[1].say("again") not in pids and clients[3].say("again") not in pids


def test_pending_calls_and_conversations_wait_in_the_same_places(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    stateful = running.admin.new_token(sessionMode="stateful")
    for number in range(2):
        stateful.answer("hello", conversation=str(number))
        Client(fake, running.admin).say("chat %d" % number)
        post(running.admin, "openai", chat_that_calls("openai", ["look", {"at": str(number)}]))
    assert running.waiting() == list(dict.fromkeys(reached.pid for reached in seen(fake)))[-4:]


def test_revoking_a_token_ends_its_processes(bridge: Bridges, fake: FakeClaude) -> None:
    running = bridge(fake)
    gone, stays = (Client(fake, running.admin.new_token(name)) for name in ("gone", "stays"))
    pid, other = gone.say("one"), stays.say("one")
    post(gone.admin, "anthropic", chat_that_calls("anthropic"))
    pending = seen(fake)[-1].pid
    token_id = next(
        token["id"]
        for token in running.admin.get("/api/tokens").json["tokens"]
        if token["name"] == "gone"
    )
    assert running.admin.delete("/api/tokens/" + token_id).status == 200
    wait_until(lambda: not is_running(pid) and not is_running(pending))
    assert stays.say("two") == other


# --- at once ---


def test_the_same_conversation_sent_twice_at_once_never_mixes(
    bridge: Bridges, fake: FakeClaude
) -> None:
    """Every client reads its own answer, and every prompt follows the turns of its client."""
    running = bridge(twist(fake, UNIQUE))
    client = Client(fake, running.admin)
    client.say("one")
    sent: List[Turns] = []

    def go_on(number: int) -> None:
        copy = client.copy()
        for prompt in ("the same", "of %d" % number, "the same"):
            answer = words(post(copy.admin, "anthropic", copy.body(prompt)))
            assert prompt in answer
            sent.append([*copy.turns, ("user", prompt)])
            copy.turns = [*sent[-1], ("assistant", answer.strip())]

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(go_on, range(3)))
    received = [[(role, said.strip()) for role, said in reached.turns] for reached in seen(fake)]
    assert len(sent) == 18 and len(received) == 19
    for turns in sent:
        received.remove([(role, said.strip()) for role, said in turns])


# --- a history that is sent ---


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_history_goes_in_one_write_after_its_first_pair(
    bridge: Bridges, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writes: List[int] = []
    send = cab.ClaudeProcess.send

    def counted(process: cab.ClaudeProcess, *messages: Mapping[str, Any]) -> None:
        writes.append(len(messages))
        send(process, *messages)

    monkeypatch.setattr(cab.ClaudeProcess, "send", counted)
    client = Client(fake, bridge(fake).admin)
    client.turns = exchanges(number)
    pid = client.say("now")
    pairs = ["piped", "assistant"] * (number - 1)
    probe = WARM_UP if number > 1 else []
    expected = ["initialize", *probe, "told", "assistant", *pairs, "user"]
    assert kinds(fake, pid) == expected
    # The last one but one sets the limit of the answer.
    assert writes[-4:] == [1, 2 * number - 1, 1, 1]
    # The probe left nothing, and is not repeated.
    other = Client(fake, client.admin)
    other.turns = exchanges(number, "other ")
    pid = other.say("now")
    assert kinds(fake, pid) == ["initialize", "told", "assistant", *pairs, "user"]


@pytest.mark.parametrize("version", ["2.1.197 (Claude Code)", "2.1.330 (Claude Code)"])
def test_a_cli_that_takes_no_piped_messages_gets_a_turn_each(
    bridge: Bridges, fake_claude: Fakes, version: str
) -> None:
    fake = twist(fake_claude(version=version), NOTED + NO_PIPE)
    client = Client(fake, bridge(fake).admin)
    client.turns = exchanges(4)
    told = ["initialize", *["told", "assistant"] * 4, "user"]
    pid = client.say("now")
    assert kinds(fake, pid) == [*told[:1], *(WARM_UP if "330" in version else []), *told[1:]]
    other = client.copy(8, system="Be rude.")
    assert kinds(fake, other.say("now")) == told


def test_a_cli_that_does_not_go_back_from_the_probe_is_used_without_it(
    bridge: Bridges, fake: FakeClaude
) -> None:
    client = Client(fake, bridge(twist(fake, NO_REWIND)).admin)
    client.turns = exchanges(3)
    pid = client.say("now")
    assert len(fake.children()) == 2 and "rewind_conversation" not in kinds(fake, pid)
    other = client.copy(6, system="Be rude.")
    assert "rewind_conversation" not in kinds(fake, other.say("now"))
    assert len(fake.children()) == 3


def test_a_probe_that_gets_no_answer_ends_with_the_run(
    direct: Directs, fake: FakeClaude
) -> None:
    d = direct(twist(fake, SILENT_REWIND), run_seconds=0.5, silence_seconds=0.3)
    history = [cab.HistoryTurn("q", "a")] * 2
    began = time.monotonic()

    def give_up() -> Optional[str]:
        return "cancelled" if time.monotonic() - began > 5 else None

    with pytest.raises(cab.RunFailed) as caught:
        d.run("now", give_up, work={"history": lambda: history, "is_chat": True})
    assert caught.value.code == "timeout"


def test_a_turn_with_more_than_a_text_is_sent_with_a_turn_of_its_own(
    bridge: Bridges, fake: FakeClaude
) -> None:
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }
    admin = bridge(fake).admin
    contents: List[Any] = [
        "q0", "a0", "q1", "a1", [document, text("q2")], "a2", "q3", "a3",
        [text("part"), text("q4")], "a4",
    ]
    assert words(post(admin, "anthropic", talk(*contents, "now"))) == "Echo: now"
    (reached,) = seen(fake)
    assert [said for _, said in reached.turns] == [
        "q0", "a0", "q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", "now",
    ]
    received = kinds(fake, reached.pid)[-11:]
    assert received[::2] == ["told", "piped", "told", "piped", "told", "user"]
    # A turn that was sent so can be taken back, a piped one cannot.
    assert words(post(admin, "anthropic", talk(*contents[:8], "edited"))) == "Echo: edited"
    assert words(post(admin, "anthropic", talk(*contents[:6], "edited"))) == "Echo: edited"
    assert [prompt.pid == reached.pid for prompt in seen(fake)] == [True, True, False]


def test_a_prompt_after_a_piped_history_can_be_taken_back(
    bridge: Bridges, fake: FakeClaude
) -> None:
    client = Client(fake, bridge(fake).admin)
    client.turns = exchanges(5)
    pid = client.say("now")
    again = client.copy(10)
    assert [again.say("now"), again.say("then"), client.copy(10).say("edited")] == [pid] * 3


# --- a history as a file ---

OLD_CLI = "2.1.197 (Claude Code)"
NO_TRANSCRIPT = """
def refuse(self, path):
    self.say(type="result", subtype="error_during_execution", is_error=True,
             errors=["No conversation found with session ID: x"])
    sys.exit(1)
fake_claude.Fake.read_transcript = refuse
"""


def transcripts(running: RunningBridge) -> List[str]:
    """Return the names of the files with histories."""
    return os.listdir(running.data_dir / cab.TRANSCRIPTS)


def is_resumed(fake: FakeClaude, pid: int) -> bool:
    return str(session_in(argv_of(fake, pid), "--resume")).endswith(".jsonl")


@pytest.mark.parametrize("number, is_file", [(cab.TRANSCRIPT_TURNS, False), (41, True)])
def test_a_long_history_that_cannot_be_piped_is_a_file(
    bridge: Bridges, fake_claude: Fakes, number: int, is_file: bool
) -> None:
    fake = twist(fake_claude(version=OLD_CLI), NOTED)
    running = bridge(fake)
    client = Client(fake, running.admin)
    client.turns = exchanges(number)
    pid = client.say("now")
    assert is_resumed(fake, pid) == is_file and len(fake.children()) == 1
    if not is_file:
        return
    # The last answer is not in the file.
    assert kinds(fake, pid) == ["initialize", "assistant", "user"]
    assert "--no-session-persistence" in argv_of(fake, pid) and not transcripts(running)
    # It waits, continues and goes back like any other process.
    assert [client.say("then"), client.copy(-2).say("other")] == [pid, pid]
    # It cannot go back to a turn of the file.
    assert client.copy(20).say("edited") != pid


def test_a_history_that_the_cli_does_not_read_is_sent_turn_by_turn(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = twist(fake_claude(version=OLD_CLI), NOTED + NO_TRANSCRIPT)
    running = bridge(fake)
    client = Client(fake, running.admin)
    client.turns = exchanges(45)
    pid = client.say("now")
    assert kinds(fake, pid).count("told") == 45 and not transcripts(running)
    assert len(fake.children()) == 2


def test_an_idle_process_of_an_old_cli_waits_for_a_history(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = twist(fake_claude(version=OLD_CLI), NOTED)
    running = bridge(fake, spare=2)
    client = Client(fake, running.admin)

    def waits() -> List[int]:
        return [
            child["pid"]
            for child in fake.children()
            if is_resumed(fake, child["pid"]) and is_running(child["pid"])
        ]

    (ready,) = wait_until(waits)
    assert len(transcripts(running)) == 1
    client.turns = exchanges(cab.TRANSCRIPT_TURNS_READY)
    # So few are sent to the other one.
    assert client.say("now") != ready
    client.turns = exchanges(5)
    assert client.say("now") == ready
    # The next one waits at a pipe of its own. If it dies, the history is a file or is sent.
    (dead,) = wait_until(lambda: [pid for pid in waits() if pid != ready])
    os.kill(dead, signal.SIGKILL)
    client.turns = exchanges(6)
    assert client.say("now") not in (ready, dead)
    assert len(transcripts(running)) <= 1


NO_FILES = """
run = fake_claude.Fake.run
fake_claude.Fake.run = lambda self: 1 if "/" in (self.resumes or "") else run(self)
"""


def test_a_cli_that_takes_no_files_still_has_idle_processes(
    bridge: Bridges, fake_claude: Fakes
) -> None:
    fake = twist(fake_claude(version=OLD_CLI), NOTED + NO_FILES)
    running = bridge(fake, spare=2)
    wait_until(lambda: running.pool.idle_count == 2 and len(fake.children()) == 3)
    client = Client(fake, running.admin)
    client.turns = exchanges(6)
    client.say("now")


def test_the_files_of_a_killed_bridge_are_removed(bridge: Bridges, tmp_path: Path) -> None:
    folder = tmp_path / "data" / cab.TRANSCRIPTS
    folder.mkdir(parents=True)
    (folder / "left.jsonl").write_text("{}")
    (folder / "left.part").write_text("{}")
    assert transcripts(bridge()) == []


# --- a stateful token ---


def is_sent(fake: FakeClaude, number: int) -> Turns:
    return seen(fake)[number].turns


def test_all_stored_turns_are_replayed(bridge: Bridges, fake: FakeClaude) -> None:
    t = Talk(fake, bridge(fake, warm_seconds=0))
    expected: Turns = []
    for number in range(6):
        t.say("q%d" % number)
        expected.append(("user", "q%d" % number))
        assert seen(fake)[-1].turns == expected
        expected.append(("assistant", "Echo: q%d" % number))
    assert len({reached.pid for reached in seen(fake)}) == 6
    for child in fake.children():
        assert not session_in(child["argv"], "--session-id")
        assert not session_in(child["argv"], "--resume")


def test_a_restart_of_the_bridge_replays_the_stored_turns(
    bridge: Bridges, fake: FakeClaude
) -> None:
    running = bridge(fake)
    t = Talk(fake, running)
    t.say("one")
    t.say("two")
    running.bridge.__exit__(None, None, None)
    client = t.client
    client.port = bridge(fake).port
    assert client.answer("three")["response"] == "Echo: three"
    assert seen(fake)[-1].turns == [
        ("user", "one"), ("assistant", "Echo: one"), ("user", "two"), ("assistant", "Echo: two"),
        ("user", "three"),
    ]


def test_a_replay_begins_with_the_oldest_turn_within_the_limit(
    bridge: Bridges, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cab.HISTORY_BYTES == 4 << 20
    monkeypatch.setattr(cab, "HISTORY_BYTES", 4 << 10)
    t = Talk(fake, bridge(fake, warm_seconds=0))
    for number in range(6):
        # 1026 bytes with its answer.
        t.say("%d%s" % (number, "x" * 509))
    t.say("now")
    numbers = [said[0] for role, said in seen(fake)[-1].turns if role == "user"]
    assert numbers == ["3", "4", "5", "n"]


def test_a_stateful_conversation_takes_an_idle_process(
    bridge: Bridges, fake: FakeClaude
) -> None:
    t = Talk(fake, bridge(fake, spare=1))
    idle = wait_until(fake.children)[0]["pid"]
    t.say("one")
    t.say("two")
    assert [reached.pid for reached in seen(fake)] == [idle, idle]


def test_another_model_and_back_replays_the_conversation(
    bridge: Bridges, fake: FakeClaude
) -> None:
    t = Talk(fake, bridge(fake))
    t.say("one")
    t.say("two", model="haiku")
    t.say("three")
    assert seen(fake)[-1].turns == [
        ("user", "one"), ("assistant", "Echo: one"), ("user", "two"), ("assistant", "Echo: two"),
        ("user", "three"),
    ]
    assert len(t.bridge.waiting()) == 1


# --- the preparation of an idle process ---



def test_an_idle_process_is_configured_warmed_and_taken_back(
    direct: Directs, fake: FakeClaude
) -> None:
    d = direct(fake, spare=2)
    pid = d.prepare()
    assert kinds(fake, pid) == ["initialize", *WARM_UP]
    (rewind,) = requests(fake, "rewind_conversation")
    assert [rewind["target_message_uuid"]] == user_ids(fake)
    assert rewind["last_seen_user_message_uuid"] == rewind["target_message_uuid"]
    assert d.run("turns").text == "[]" and seen(fake) == [Prompt(pid, [("user", "turns")])]
    pid = d.prepare()
    assert kinds(fake, pid) == ["initialize", *WARM_UP]
    history = [cab.HistoryTurn("q%d" % n, "a%d" % n) for n in range(3)]
    d.run("now", work={"history": lambda: history})
    pairs = ["told", "assistant", "piped", "assistant", "piped", "assistant"]
    assert kinds(fake, pid) == ["initialize", *WARM_UP, *pairs, "user"]
    assert [said for _, said in seen(fake)[-1].turns] == ["q0", "a0", "q1", "a1", "q2", "a2", "now"]


def test_an_idle_process_connects_first_if_the_owner_wants_it(
    direct: Directs, fake: FakeClaude
) -> None:
    d = direct(fake, spare=2, preconnect=True)
    pid = d.prepare()
    assert kinds(fake, pid) == ["initialize", "get_context_usage", *WARM_UP]
    assert d.run("turns").text == "[]" and seen(fake)[0].pid == pid


def test_an_old_cli_is_configured_but_not_warmed(direct: Directs, fake_claude: Fakes) -> None:
    fake = twist(fake_claude(version="2.1.197 (Claude Code)"), NOTED)
    d = direct(fake, detect=True, spare=3)
    pid = d.prepare()
    assert kinds(fake, pid) == ["initialize"]
    assert d.run("turns").text == "[]" and seen(fake)[0].pid == pid


def test_the_tools_of_the_usual_requests_are_configured_too(
    direct: Directs, fake: FakeClaude
) -> None:
    d = direct(fake, spare=2)
    look = {"name": "look", "description": "Looks.", "inputSchema": SCHEMA}
    fields: Dict[str, Any] = {"client_tools": (look,), "work": {"is_chat": True}}
    for n in range(2):
        d.run("hello %d" % n, **fields)
        d.prepare()
    prepared = d.prepare()
    answer = d.run('call [["look", {}]]', **fields)
    assert [call.name for call in answer.stop_info.calls] == ["look"]
    assert seen(fake)[-1].pid == prepared


def test_a_request_waits_for_a_preparation_that_has_begun(
    direct: Directs, fake: FakeClaude
) -> None:
    d = direct(fake, spare=2)
    d.pool.maintain()
    assert d.pool.is_busy
    # Rather the other one; then none is left.
    assert d.run("turns").text == "[]" and d.run("turns").text == "[]"
    first, second = seen(fake)
    assert kinds(fake, first.pid) == ["initialize", "user"]
    assert kinds(fake, second.pid) == ["initialize", *WARM_UP, "user"]


@pytest.mark.parametrize(
    "code", [NO_REWIND, REWIND_ERROR, REWIND_DEATH], ids=["refused", "error", "death"]
)
def test_a_cli_that_does_not_go_back_is_used_without_a_warm_up(
    direct: Directs, fake: FakeClaude, clock: FakeClock, code: str
) -> None:
    # The last one waits for a history.
    d = direct(twist(fake, code), spare=3, clock=clock)
    d.pool.maintain()
    (first,) = wait_until(lambda: [pid for pid in running(fake) if kinds(fake, pid)])

    def has_ended() -> bool:
        d.pool.maintain()
        return not is_running(first)

    wait_until(has_ended)
    # One that died is not replaced at once.
    wait_until(lambda: len(fake.children()) == (3 if code == REWIND_DEATH else 4))
    # Meanwhile requests are answered by the other one.
    assert d.run("hello").text == "Echo: hello"

    def configured() -> List[int]:
        clock.advance(1)
        d.pool.maintain()
        return [
            pid
            for pid in running(fake)
            if kinds(fake, pid) == ["initialize"] and not d.pool.is_busy
        ]

    (pid,) = wait_until(configured)
    # Two processes replace the failed one and the one that answered.
    wait_until(lambda: len(fake.children()) >= 5)
    for _ in range(20):
        clock.advance(20)
        d.pool.maintain()
    assert d.run("turns").text == "[]" and seen(fake)[-1].pid == pid
    # A death may be noticed before the reason: then it happens again.
    assert len(fake.children()) <= (8 if code == REWIND_DEATH else 5)


def test_a_preparation_that_gets_no_answer_does_not_stop_a_request(
    direct: Directs, fake: FakeClaude, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "PREPARE_SECONDS", 0.2)
    d = direct(twist(fake, SILENT_REWIND), spare=3)
    d.pool.maintain()
    began = time.monotonic()
    assert d.run("hello").text == "Echo: hello" and time.monotonic() - began < 3
    assert kinds(fake, seen(fake)[0].pid) == ["initialize", "user"]
    # It may be the machine that is slow. After the second one, no request waits again.
    d.pool.maintain()
    assert d.run("again").text == "Echo: again"
    pid = d.prepare()
    assert kinds(fake, pid) == ["initialize"]
    assert d.run("turns").text == "[]" and seen(fake)[-1].pid == pid


def test_settings_that_the_cli_refuses_are_not_prepared_again_and_again(
    direct: Directs, fake: FakeClaude, clock: FakeClock
) -> None:
    d = direct(fake, spare=2, clock=clock)
    for _ in range(2):
        d.pool.maintain()
        with pytest.raises(cab.RunFailed):
            d.run("hello", system_prompt="refuse this")
    for _ in range(20):
        clock.advance(31)
        wait_until(lambda: d.pool.maintain() or not d.pool.is_busy)
    assert len(fake.children()) <= 8
    assert d.run("turns").text == "[]"


# --- a token with tools ---


def test_a_token_with_tools_finds_a_process_ready(
    direct: Directs, fake: FakeClaude, clock: FakeClock, tmp_path: Path
) -> None:
    """It has no configuration: that of each request is its own."""
    d = direct(fake, spare=1, clock=clock)
    fields = {"tools": "read", "workspace": str(tmp_path)}
    d.pool.maintain()
    d.run("one", **fields)
    d.pool.maintain()
    ready = new_pid(fake, "Read")
    clock.advance(cab.TOOL_SPARE_SECONDS - 1)
    d.pool.maintain()
    d.run("two", system_prompt="Be brief.", **fields)
    assert seen(fake)[1].pid == ready
    assert kinds(fake, ready) == ["initialize", "user"]
    d.pool.maintain()
    last = new_pid(fake, "Read")
    clock.advance(cab.TOOL_SPARE_SECONDS)
    d.pool.maintain()
    d.wait_for_end(last)
    assert len(fake.children()) == 4 and len(running(fake)) == 1


def test_the_ready_process_is_prepared_for_the_settings_of_two_requests(
    direct: Directs, fake: FakeClaude, tmp_path: Path
) -> None:
    d = direct(fake, spare=1)
    fields = {"tools": "read", "workspace": str(tmp_path), "system_prompt": "Be brief."}
    for message in ("one", "two"):
        d.run(message, **fields)
        d.pool.maintain()
    ready = d.prepare()
    assert kinds(fake, ready) == ["initialize", *WARM_UP]
    d.run("turns", **fields)
    assert seen(fake)[-1] == Prompt(ready, [("user", "turns")])
    # A request with other settings does not get it, and neither does the next one.
    ready = d.prepare()
    d.run("other", **{**fields, "system_prompt": "Be rude."})
    d.pool.maintain()
    d.wait_for_end(ready)
    assert seen(fake)[-1].pid != ready


def new_pid(fake: FakeClaude, tool: str) -> int:
    """Wait for the process with this tool that received nothing yet."""

    def unused() -> List[int]:
        used = {entry["pid"] for entry in fake._log("lines.jsonl")}
        return [
            child["pid"]
            for child in fake.children()
            if any(tool in word for word in child["argv"])
            and child["pid"] not in used
            and is_running(child["pid"])
        ]

    (pid,) = wait_until(unused)
    return int(pid)


def test_a_conversation_with_tools_begins_in_a_ready_process(
    bridge: Bridges, fake: FakeClaude
) -> None:
    served = bridge(fake, spare=1)
    t = Talk(fake, served, "read")
    t.say("one", conversation="first")
    ready = new_pid(fake, "Read")
    t.say("two", conversation="second")
    assert seen(fake)[1].pid == ready and session_in(argv_of(fake, ready), "--session-id")


def test_the_ready_process_of_a_revoked_token_ends(bridge: Bridges, fake: FakeClaude) -> None:
    served = bridge(fake, spare=1)
    client = served.admin.new_token("tooled", tools="read")
    client.answer("one")
    ready = new_pid(fake, "Read")
    token_id = next(
        token["id"]
        for token in served.admin.get("/api/tokens").json["tokens"]
        if token["name"] == "tooled"
    )
    assert served.admin.delete("/api/tokens/" + token_id).status == 200
    wait_until(lambda: not is_running(ready) and len(running(fake)) == 1)


# --- a thousand random conversations ---

RANDOM_SECONDS = 10
RANDOM_STEPS = 500


class Log:
    """The prompts that reached the fake, read as they are written."""

    def __init__(self, fake: FakeClaude) -> None:
        self._path = fake.folder / "turns.jsonl"
        self._offset = 0
        self.pids: List[int] = []

    def read(self) -> List[Message]:
        """Return the turns of the only new prompt."""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        (line,) = data.splitlines()
        note = json.loads(line)
        self.pids.append(note["pid"])
        return [(role, said) for role, said in note["turns"]]


@pytest.mark.parametrize("version", ["2.1.197 (Claude Code)", "2.1.330 (Claude Code)"])
def test_a_thousand_random_conversations(
    bridge: Bridges, fake_claude: Fakes, version: str
) -> None:
    options = {"version": version} if "197" in version else {}
    code = NOTED + UNIQUE + (NO_PIPE if options else "")
    fake = twist(fake_claude(**options), code)
    served = [bridge(fake, spare=2)]
    admin = served[0].admin
    clients = [admin, admin.new_token("other")]
    log = Log(fake)

    def send(chat: RandomChat) -> str:
        return words(post(clients[chat.client], chat.api, body_of(chat)))

    def kill_waiting() -> None:
        for pid in served[-1].waiting():
            os.kill(pid, signal.SIGKILL)

    def restart() -> None:
        served[-1].bridge.__exit__(None, None, None)
        served.append(bridge(fake, spare=2))
        for client in clients:
            client.port = served[-1].port

    chats = RandomChats(15, 2, send, log.read, {kill_waiting: 0.02, restart: 0.005})
    deadline = time.monotonic() + RANDOM_SECONDS
    while chats.count < RANDOM_STEPS and time.monotonic() < deadline:
        chats.step()
        assert len(served[-1].waiting()) <= cab.MAX_KEPT_PROCESSES
    # Not all of them were replayed.
    assert chats.count > 50 and len(set(log.pids)) < 0.7 * chats.count
