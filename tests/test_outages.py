"""Outages: nothing that the requests did not cause makes them fail, and all goes on by itself.

The API away, a refused login, an overload, a used-up plan, the owner's pause. The rules of a hold,
what the worker does, what the callers see, and the shapes in which the real CLI reports each case.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import (
    TESTS, Api, FakeClaude, FakeClock, Program, RunningBridge, run_cli, wait_until,
)
from test_formats import PATHS, both, events, kind_of, post, rows, streamed, talk, words
from test_queue import Queue, Run, TwoClocks, echo, failing, new_queue, queue, refused, saying
from test_stream import Skipped, script

__all__ = ["new_queue", "queue"]

Start = Callable[..., RunningBridge]
Make = Callable[..., Queue]

# --- the rules of a hold ---

NETWORK = cab.RunFailed("network", "API Error: Connection refused")
LOGIN = cab.RunFailed("auth_required", "Not logged in")
OVERLOAD = cab.RunFailed("overloaded", "API Error: 529 Overloaded", is_of_model=True)


class Holds:
    """A QueueHolds over a real store. login: what its fingerprint is."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self.clock, self.login = clock, "first"
        self.stores = cab.Stores(path, clock)
        self.holds = self.restarted()

    def restarted(self) -> cab.QueueHolds:
        return cab.QueueHolds(self.stores.database, self.clock, lambda: self.login)

    def fail(self, failure: cab.RunFailed, model: str = "") -> float:
        """Try, and fail. -> the seconds until the next try."""
        self.holds.note_try()
        pause = self.holds.begin(failure, model, self.clock.now())
        return pause.until - self.clock.now()


@pytest.fixture
def held(tmp_path: Path, clock: FakeClock) -> Iterator[Holds]:
    holds = Holds(tmp_path / "bridge.db", clock)
    yield holds
    holds.stores.close()


def test_the_time_between_two_tries_grows_and_starts_again_after_an_answer(held: Holds) -> None:
    waits = []
    for _ in range(8):
        waits.append(held.fail(NETWORK))
        held.clock.advance(waits[-1])
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    held.holds.end("")
    assert held.holds.active() == {} and held.fail(NETWORK) == 2


def test_a_network_hold_lasts_until_an_answer_and_allows_a_try_at_its_end(held: Holds) -> None:
    began = held.clock.at
    held.fail(NETWORK)
    assert held.holds.held_models() == [cab.ALL_MODELS]
    held.clock.advance(1.99)
    assert held.holds.held_models() == [cab.ALL_MODELS]
    held.clock.advance(0.01)
    assert held.holds.held_models() == []
    # Requests still wait for the network, whatever their model, and since the first failure.
    for model in (cab.ALL_MODELS, None, "opus"):
        pause = held.holds.current(model)
        assert pause and (pause.reason, pause.since) == ("network", began)
        assert pause.text == str(NETWORK)
    held.fail(NETWORK)
    pause = held.holds.current()
    assert pause and pause.since == began < held.clock.at


@pytest.mark.parametrize("which", ["at", "passed"])
def test_a_try_is_due_when_either_clock_has_reached_the_end(tmp_path: Path, which: str) -> None:
    clock = TwoClocks()
    held = Holds(tmp_path / "bridge.db", clock)
    held.fail(NETWORK)
    setattr(clock, which, getattr(clock, which) + 2)
    assert held.holds.held_models() == []
    held.stores.close()


def test_the_reason_may_change_but_nothing_was_answered_meanwhile(held: Holds) -> None:
    began = held.clock.at
    held.fail(NETWORK)
    held.clock.advance(100)
    assert held.fail(LOGIN) == cab.LOGIN_RETRY_SECONDS == 300
    pause = held.holds.current()
    assert pause and (pause.reason, pause.since) == ("login", began)
    pause = held.restarted().current()
    assert pause and (pause.reason, pause.since) == ("login", began)
    held.clock.advance(300)
    assert held.fail(NETWORK) == 8
    pause = held.holds.current()
    assert pause and (pause.reason, pause.since) == ("network", began)


def test_an_overload_holds_its_model_and_says_that_the_network_works(held: Holds) -> None:
    held.fail(NETWORK)
    assert held.fail(OVERLOAD, "opus") == 2
    assert held.holds.held_models() == ["opus"]
    assert held.holds.current() is None and held.holds.current(None) is None
    pause = held.holds.current("opus")
    assert pause and pause.reason == "overloaded"
    assert held.fail(OVERLOAD, "") == 2 and sorted(held.holds.held_models()) == ["", "opus"]
    # An answer of another model says nothing of this one.
    held.holds.end("")
    assert held.holds.held_models() == ["opus"]
    held.clock.advance(2)
    assert held.fail(OVERLOAD, "opus") == 4


def test_an_answer_does_not_end_a_used_up_limit(held: Holds) -> None:
    held.fail(cab.RunFailed("usage_limit", "used up", held.clock.at + 3600, True), "opus")
    held.fail(NETWORK, "opus")
    held.holds.end("opus")
    assert held.holds.held_models() == ["opus"] and held.holds.current() is None
    held.clock.advance(3600)
    # Unlike the network, the limit needs no answer to be over.
    assert held.holds.current("opus") is None


def test_a_new_login_is_tried_at_once(held: Holds) -> None:
    held.fail(LOGIN)
    held.clock.advance(10)
    held.holds.refresh(True)
    assert held.holds.held_models() == [cab.ALL_MODELS]
    held.login = "second"
    held.holds.refresh(True)
    assert held.holds.held_models() == []
    pause = held.holds.current()
    assert pause and (pause.reason, pause.since) == ("login", held.clock.at - 10)
    # The second login is refused, too: it is not tried again and again.
    held.fail(LOGIN)
    held.holds.refresh(True)
    assert held.holds.held_models() == [cab.ALL_MODELS]


def test_a_login_that_changes_during_the_run_that_fails_is_tried_at_once(held: Holds) -> None:
    held.holds.note_try()
    held.login = "second"
    held.holds.begin(LOGIN, "", held.clock.now())
    held.holds.refresh(True)
    assert held.holds.held_models() == []


@pytest.mark.parametrize("failure", [NETWORK, OVERLOAD])
def test_a_new_login_changes_nothing_for_other_reasons(
    held: Holds, failure: cab.RunFailed
) -> None:
    held.fail(failure)
    held.login = "second"
    held.holds.refresh(True)
    assert len(held.holds.held_models()) == 1


def test_what_no_request_waits_for_is_forgotten_when_it_is_due(held: Holds) -> None:
    held.fail(NETWORK)
    held.holds.refresh(False)
    assert held.holds.current()
    held.clock.advance(2)
    held.holds.refresh(True)
    assert held.holds.current()
    held.holds.refresh(False)
    assert held.holds.current() is None and held.restarted().current() is None


@pytest.mark.parametrize("failure, reason", [(NETWORK, "network"), (LOGIN, "login")])
def test_a_restart_knows_reason_and_begin_and_tries_at_once(
    held: Holds, failure: cab.RunFailed, reason: str
) -> None:
    began = held.clock.at
    held.fail(failure)
    held.clock.advance(1)
    held.fail(failure)
    held.clock.advance(1)
    held.holds = held.restarted()
    # Nobody knows until when: it is tried now.
    assert held.holds.current() == cab.Pause(reason, 0.0, began, str(failure))
    assert cab.pause_body(held.holds.current()) == {"waitingFor": reason}
    assert held.holds.held_models() == []
    held.fail(failure)
    held.holds = held.restarted()
    pause = held.holds.current()
    assert pause and pause.since == began
    held.holds.end("")
    assert held.restarted().current() is None


@pytest.mark.parametrize(
    "failure",
    [
        OVERLOAD,
        # A machine without processes to spare.
        cab.RunFailed("overloaded", "claude could not be started"),
        cab.RunFailed("usage_limit", "used up", 1_800_000_300.0),
    ],
)
def test_other_holds_end_with_the_process(held: Holds, failure: cab.RunFailed) -> None:
    held.fail(failure)
    assert held.holds.current(None)
    assert held.restarted().current(None) is None
    held.fail(NETWORK)
    held.fail(failure)
    assert held.holds.current(None)
    assert held.restarted().current(None) is None


def test_secrets_in_the_error_are_neither_stored_nor_reported(held: Holds) -> None:
    secret = cab.new_token()
    held.fail(cab.RunFailed("network", "no route for " + secret))
    pauses = held.holds.current(), held.restarted().current()
    assert all(pause and pause.text and secret not in pause.text for pause in pauses)


def test_the_pause_of_the_owner_comes_before_everything(held: Holds) -> None:
    held.fail(NETWORK)
    held.clock.advance(5)
    held.stores.database.set_state("paused", str(held.clock.now()))
    assert cab.ALL_MODELS in held.holds.held_models()
    for model in (cab.ALL_MODELS, None, "opus"):
        pause = held.holds.current(model)
        assert pause and pause[:3] == ("paused", math.inf, held.clock.at)
    held.holds.end("")
    assert held.holds.current() and held.restarted().current()
    held.stores.database.set_state("paused", None)
    assert held.holds.current() is None and held.holds.held_models() == []


# --- the worker ---


def script_all(queue: Queue, run: Run) -> None:
    """Let every message run like this."""

    class Everything(Dict[str, Run]):
        def get(self, key: str, default: Any = None) -> Run:
            return run

    queue.claude.script = Everything()


def fail_all(queue: Queue, code: str, text: str = "API Error: it broke", **how: Any) -> None:
    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        raise cab.RunFailed(code, text, **how)

    script_all(queue, run)


def ask_chat(queue: Queue, message: str, **fields: Any) -> str:
    """Queue a request of /v1."""
    turns = ({"role": "user", "content": [{"type": "text", "text": message}]},)
    result = queue.store.jobs.enqueue(queue.token.id, cab.Chat(turns, **fields))
    queue.notifier.notify(cab.Notifier.JOB_QUEUED)
    return result[0].id


def maintain(queue: Queue) -> None:
    """Let the worker do what it does every second."""
    queue.worker._maintain_at = float("-inf")
    queue.worker._run_maintenance()


def states(queue: Queue, jobs: List[str]) -> List[Tuple[str, Optional[str], int]]:
    found = [queue.job(job) for job in jobs]
    return [(job.status, job.error_code, job.attempts) for job in found]


HELD = {
    "network": dict(code="network"), "login": dict(code="auth_required"),
    "overloaded": dict(code="overloaded", is_of_model=True),
}


@pytest.mark.parametrize("reason", list(HELD))
def test_a_failed_request_goes_back_to_the_head_and_all_run_in_order(
    new_queue: Make, clock: FakeClock, reason: str
) -> None:
    queue = new_queue(clock)
    jobs = [queue.ask(message) for message in ("a", "b", "c")]
    assert queue.worker.step() and queue.outcome(jobs[0]) == ("completed", "Echo: a")
    fail_all(queue, **HELD[reason])
    for seconds in (300, 300, 300):
        assert queue.run_all() == ["b"]
        assert states(queue, jobs[1:]) == [("queued", None, 0)] * 2
        job = queue.job(jobs[1])
        assert (job.started_at, job.error) == (None, None)
        assert queue.store.jobs.queue_positions(job) == (1, 1)
        pause = queue.worker.current_pause(None)
        assert pause and pause.reason == reason
        clock.advance(seconds)
    queue.claude.script = {}
    assert queue.run_all() == ["b", "c"] and queue.worker.current_pause(None) is None
    assert states(queue, jobs) == [("completed", None, 1)] * 3


def test_one_request_is_tried_and_only_when_it_is_time(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock)
    for message in ("a", "b", "c"):
        queue.ask(message)
    fail_all(queue, "network")
    began, tried = clock.at, []
    while clock.at < began + 250:
        tried += [(clock.at - began, message) for message in queue.run_all()]
        clock.advance(0.5)
    times = [0, 2, 6, 14, 30, 62, 122, 182, 242]
    assert tried == [(seconds, "a") for seconds in times]


def test_the_worker_thread_wakes_when_a_try_is_due_and_then_does_all_that_waits(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(cab, "MAINTENANCE_SECONDS", 60.0)
    left = [4]

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        if left[0]:
            left[0] -= 1
            raise cab.RunFailed("network", "away")
        return echo(work, live, stop_reason)

    script_all(queue, run)
    jobs = [queue.ask(message) for message in ("a", "b")]
    queue.worker.start()
    assert [queue.outcome(job) for job in jobs] == [("completed", "Echo: " + m) for m in "ab"]
    assert [work.message for work in queue.claude.seen] == ["a"] * 5 + ["b"]
    assert states(queue, jobs) == [("completed", None, 1)] * 2
    assert any("answers again" in line for line in queue.log)


@pytest.mark.parametrize("model", ["opus", None])
def test_other_models_go_on_during_an_overload(
    new_queue: Make, clock: FakeClock, model: Optional[str]
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = failing("overloaded", "API Error: 529", None, True)
    one, two = queue.ask("one", model=model), queue.ask("two", model=model)
    other = queue.ask("other", model="haiku")
    assert queue.run_all() == ["one", "other"] and queue.outcome(other)[0] == "completed"
    assert queue.worker.current_pause() is None and queue.worker.current_pause("haiku") is None
    pause = queue.worker.current_pause(model)
    assert pause and pause[:2] == ("overloaded", clock.at + 2)
    # The answer of the other model did not end it.
    assert queue.run_all() == []
    queue.claude.script = {}
    clock.advance(2)
    assert queue.run_all() == ["one", "two"]
    assert states(queue, [one, two]) == [("completed", None, 1)] * 2


def test_a_turn_waits_for_the_turn_before_it_whatever_holds_that(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = failing("overloaded", "API Error: 529", None, True)
    turns = [
        queue.ask(message, conversation="trip", model=model)
        for message, model in (("one", "opus"), ("two", "haiku"), ("three", None))
    ]
    queue.ask("beside", conversation="other", model="haiku")
    assert queue.run_all() == ["one", "beside"]
    # What cannot run is nothing to do.
    assert not queue.store.jobs.has_queued(queue.worker.holds.held_models())
    queue.claude.script = {}
    clock.advance(2)
    assert queue.run_all() == ["one", "two", "three"]
    assert states(queue, turns) == [("completed", None, 1)] * 3


def test_a_turn_says_what_the_turn_before_it_waits_for(
    bridge: Start, fake_claude: Callable[..., FakeClaude]
) -> None:
    running = bridge(fake_claude())
    api = running.admin.new_token(sessionMode="stateful")
    overloaded = script({"fail": {"said": "server_error", "api_error_status": 529,
                                  "result": "API Error: 529 Overloaded."}})
    first = api.ask(overloaded, model="opus")
    wait_until(lambda: api.poll(first).get("waitingFor") == "overloaded")
    second = api.ask("hi", model="haiku")
    assert api.poll(second)["waitingFor"] == "overloaded"
    beside = api.ask("hi", model="haiku", conversation="other")
    assert api.done(beside)["status"] == "completed"


def test_a_turn_waits_for_the_turn_before_it_that_others_are_tried_before(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)

    def boom(*arguments: Any) -> cab.Answer:
        raise cab.RunFailed("network", "API Error: 500 boom", is_answered=True)

    queue.claude.script["one"] = boom
    one, _ = [queue.ask(message, conversation="trip") for message in ("one", "two")]
    for _ in range(cab.SERVER_ERRORS + 3):
        assert queue.run_all() == ["one"]
        clock.advance(60)
    beside = queue.ask("beside")
    # Since another one was answered, the first turn has its last try.
    assert queue.run_all() == ["beside", "one"] and queue.outcome(beside)[0] == "completed"
    assert queue.outcome(one) == ("error", "network")
    clock.advance(60)
    assert queue.run_all() == ["two"]


def test_requests_that_come_while_the_api_answers_wait_for_their_turn(
    new_queue: Make, clock: FakeClock
) -> None:
    """The first answer after an outage may be long."""
    queue = new_queue(clock)
    fail_all(queue, "network")
    queue.ask("long")
    assert queue.run_all() == ["long"]
    chats: List[str] = []

    def long_answer(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        assert stop_reason() is None and queue.worker.current_pause()
        live.is_answering = True
        chats.append(ask_chat(queue, "chat"))
        for _ in range(100):
            clock.advance(1)
            assert stop_reason() is None and queue.worker.current_pause() is None
        # It breaks off: the time between two tries grows.
        if len(chats) == 1:
            raise cab.RunFailed("network", "reset", is_cut=True)
        return echo(work, live, stop_reason)

    queue.claude.script = {"long": long_answer}
    clock.advance(2)
    assert queue.run_all() == ["long"]
    pause = queue.worker.current_pause()
    assert pause and pause.until == clock.at + 4
    clock.advance(4)
    assert queue.run_all()[0] == "long"
    assert [queue.job(chat).status for chat in chats] == ["error", "completed"]


def test_an_answer_that_breaks_off_again_and_again_ends_its_request(
    new_queue: Make, clock: FakeClock
) -> None:
    """Each try costs a part of the plan. Such a proxy ends each connection after a minute."""
    queue = new_queue(clock)

    def breaks_off(*arguments: Any) -> cab.Answer:
        raise cab.RunFailed("network", "API Error: terminated", is_cut=True)

    queue.claude.script = {"one": breaks_off}
    one, two = queue.ask("one"), queue.ask("two")
    queue.store.jobs.fail(queue.job(two), "cancelled", "", ("queued",))
    for _ in range(cab.CUT_ANSWERS):
        assert queue.run_all() == ["one"]
        clock.advance(60)
    assert queue.outcome(one) == ("error", "network") and queue.run_all() == []


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_clock_that_is_set_back_lets_no_client_wait_for_longer(
    tmp_path: Path, new_queue: Make, is_paused: bool
) -> None:
    clock = TwoClocks()
    queue = new_queue(clock)
    fail_all(queue, "network")
    queue.ask("native")
    if is_paused:
        cab.pause_queue(queue.store.database, True)
    else:
        queue.run_all()
    before = ask_chat(queue, "before")
    maintain(queue)
    clock.at -= 86_400
    after = ask_chat(queue, "after")
    for _ in range(31):
        clock.at += 1
        clock.passed += 1
        maintain(queue)
    code = "paused" if is_paused else "network"
    assert states(queue, [before, after]) == [("error", code, 0)] * 2


def test_another_program_may_pause_and_resume_at_any_moment(
    tmp_path: Path, clock: FakeClock
) -> None:
    """What this program has read lately may be out of date."""
    path = tmp_path / "bridge.db"
    ours, other = cab.Stores(path, clock).database, cab.Stores(path, clock).database
    try:
        for _ in range(3):
            for is_paused in (True, False):
                ours.get_state("paused")
                cab.pause_queue(other, is_paused)
                cab.pause_queue(ours, is_paused)
                cab.pause_queue(other, not is_paused)
                cab.pause_queue(ours, is_paused)
                began = clock.now()
                clock.advance(1)
                cab.pause_queue(ours, is_paused)
                # The first pause counts.
                stored = ours.read("SELECT value FROM remembered WHERE name = 'paused'")
                assert stored == ([(str(began),)] if is_paused else [])
    finally:
        ours.close()
        other.close()


def test_a_request_that_ends_the_bridge_is_not_tried_for_ever_in_an_outage(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.ask("first")
    fail_all(queue, "network")
    queue.run_all()
    jobs = queue.store.jobs
    for number in range(cab.OUTAGE_CRASHES + cab.JOB_ATTEMPTS):
        assert jobs.claim() and jobs.recover()[1] == 0 or number >= cab.OUTAGE_CRASHES
        # The start afterwards, while nothing runs, is no crash.
        assert jobs.recover() == (0, 0)
    assert [job.error_code for job in jobs.page(cab.JobFilter(), None, 9)[0]] == ["interrupted"]


def test_too_few_processes_hold_all_models(new_queue: Make, clock: FakeClock) -> None:
    """No process can be started here, whatever the model."""
    queue = new_queue(clock)
    fail_all(queue, "overloaded", "claude could not be started")
    queue.ask("one", model="opus")
    queue.ask("two", model="haiku")
    assert queue.run_all() == ["one"]
    pause = queue.worker.current_pause()
    assert pause and pause.reason == "overloaded"


class Signed:
    """A home with a login file."""

    def __init__(self, home: Path, variable: str = "HOME") -> None:
        folder = home / ".claude" if variable == "HOME" else home
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / ".credentials.json"
        self.file.write_text("{}")
        self.environ = {"HOME": str(home.parent), variable: str(home)}

    def renew(self) -> None:
        """Touch it, as the same content of the same size may be another login."""
        status = self.file.stat()
        os.utime(self.file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    "variable", ["HOME", "CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR"]
)
def test_a_renewed_login_is_tried_at_once(
    new_queue: Make, clock: FakeClock, tmp_path: Path, variable: str
) -> None:
    queue, signed = new_queue(clock), Signed(tmp_path / "home", variable)
    features = cab.Features.read("", "")
    queue.claude.install = cab.ClaudeInstall((), features, signed.environ, "")
    fail_all(queue, "auth_required", "Failed to authenticate. API Error: 401")
    jobs = [queue.ask("a"), queue.ask("b")]
    assert queue.run_all() == ["a"]
    for _ in range(3):
        maintain(queue)
        assert queue.run_all() == []
        clock.advance(1)
    # The new one is refused, too.
    signed.renew()
    maintain(queue)
    assert queue.run_all() == ["a"]
    maintain(queue)
    assert queue.run_all() == []
    queue.claude.script = {}
    signed.file.unlink()
    maintain(queue)
    assert queue.run_all() == ["a", "b"] and states(queue, jobs) == [("completed", None, 1)] * 2


def test_a_refused_login_is_tried_every_five_minutes(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock)
    fail_all(queue, "auth_required")
    queue.ask("a")
    began, tried = clock.at, []
    while clock.at < began + 1000:
        maintain(queue)
        tried += [clock.at - began for _ in queue.run_all()]
        clock.advance(10)
    assert tried == [0, 300, 600, 900]


@pytest.mark.parametrize("reason", list(HELD))
def test_after_hold_hours_native_requests_fail_each_counted_from_its_own_creation(
    new_queue: Make, clock: FakeClock, reason: str
) -> None:
    queue = new_queue(clock, hold_hours=2)
    how = HELD[reason]
    # Waiting for its turn before the hold does not count.
    first = queue.ask("first")
    clock.advance(5 * 3600)
    fail_all(queue, **how)
    assert queue.run_all() == ["first"]
    clock.advance(3600)
    later = queue.ask("later")
    clock.advance(3599)
    maintain(queue)
    assert states(queue, [first, later]) == [("queued", None, 0)] * 2
    clock.advance(1)
    maintain(queue)
    # Not before one more try: perhaps the machine slept.
    assert states(queue, [first, later]) == [("queued", None, 0)] * 2
    assert queue.run_all() == ["first"]
    assert states(queue, [first, later]) == [("error", how["code"], 0), ("queued", None, 0)]
    assert "it broke" in str(queue.job(first).error)
    clock.advance(3600)
    assert queue.run_all() == ["later"]
    assert queue.outcome(later) == ("error", how["code"])


def test_hold_hours_do_not_count_for_the_plan_and_the_owner(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock, hold_hours=1)
    queue.claude.script["a"] = refused(clock.at + 6 * 3600)
    job = queue.ask("a")
    queue.run_all()
    clock.advance(5 * 3600)
    maintain(queue)
    assert states(queue, [job]) == [("queued", None, 0)]
    queue.store.database.set_state("paused", str(clock.now()))
    clock.advance(5 * 3600)
    maintain(queue)
    assert states(queue, [job]) == [("queued", None, 0)] and queue.run_all() == []


def test_by_default_native_requests_wait_for_a_day() -> None:
    assert cab.Config().hold_hours == 24


@pytest.mark.parametrize("reason, limit", [("network", 30), ("login", 30), ("overloaded", 20)])
def test_requests_of_v1_wait_for_seconds_only(
    new_queue: Make, clock: FakeClock, reason: str, limit: int
) -> None:
    queue = new_queue(clock)
    how = HELD[reason]
    native, early = queue.ask("native"), ask_chat(queue, "early")
    clock.advance(1000)
    fail_all(queue, **how)
    queue.run_all()
    clock.advance(10)
    late = ask_chat(queue, "late")
    clock.advance(limit - 10 - 0.5)
    maintain(queue)
    assert {job[0] for job in states(queue, [native, early, late])} == {"queued"}
    clock.advance(0.5)
    maintain(queue)
    assert states(queue, [native, early, late]) == [
        ("queued", None, 0), ("error", how["code"], 0), ("queued", None, 0),
    ]
    clock.advance(10)
    maintain(queue)
    assert states(queue, [native, late]) == [("queued", None, 0), ("error", how["code"], 0)]
    # The hold is old, the request is not.
    clock.advance(500)
    newest = ask_chat(queue, "newest")
    maintain(queue)
    assert queue.job(newest).status == "queued"


def test_an_overload_fails_requests_of_v1_for_its_model_only(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    fail_all(queue, **HELD["overloaded"])
    busy = ask_chat(queue, "busy", model="opus")
    queue.run_all()
    queue.store.database.set_state("paused", str(clock.now()))
    other = ask_chat(queue, "other", model="haiku")
    clock.advance(20)
    maintain(queue)
    assert states(queue, [busy, other]) == [("error", "overloaded", 0), ("queued", None, 0)]


def test_a_request_on_which_alone_the_api_fails_blocks_the_others_for_a_while_only(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["bad"] = lambda work, live, stop_reason: fail_answered()
    bad, jobs = queue.ask("bad"), [queue.ask("b"), queue.ask("c")]
    ran: List[str] = []
    for _ in range(400):
        ran += queue.run_all()
        clock.advance(0.5)
    assert ran == ["bad"] * cab.SERVER_ERRORS + ["b", "bad", "c"] and cab.SERVER_ERRORS == 5
    assert states(queue, [bad, *jobs]) == [
        ("error", "network", 1), ("completed", None, 1), ("completed", None, 1),
    ]
    assert "500 boom" in str(queue.job(bad).error) and queue.worker.current_pause() is None


def fail_answered(code: str = "network") -> cab.Answer:
    raise cab.RunFailed(code, "API Error: 500 boom", is_answered=True)


def test_a_few_errors_before_an_answer_to_another_request_are_forgotten(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    left = [2]

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        if str(work.message) == "bad" and left[0]:
            left[0] -= 1
            return fail_answered()
        return echo(work, live, stop_reason)

    script_all(queue, run)
    other = queue.ask("other", model="haiku")
    bad = queue.ask("bad")
    queue.run_all()
    assert queue.outcome(other)[0] == "completed"
    # Another one is answered while it waits.
    queue.worker.holds.end("", other)
    queue.run_all()
    clock.advance(4)
    queue.run_all()
    assert states(queue, [bad]) == [("completed", None, 1)]


def test_the_clients_of_held_requests_are_notified_of_their_failure(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    fail_all(queue, "network")
    queue.run_all()
    chat = ask_chat(queue, "chat")
    queue.run_all()
    clock.advance(31)
    with queue.notifier.subscribe(chat) as waiter:
        queue.worker._fail_held()
        assert waiter.wait(0) and queue.job(chat).error_code == "network"


def test_no_request_is_suspected_while_the_api_fails_on_all(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    fail_all(queue, "network", is_answered=True)
    jobs = [queue.ask(message) for message in "abc"]
    ran: List[str] = []
    while clock.at < 1_800_000_000 + 3600:
        ran += queue.run_all()
        clock.advance(1)
    assert states(queue, jobs) == [("queued", None, 0)] * 3 and {*ran} == {*"abc"}
    # Half an hour of server errors is not the fault of the first one that is tried again.
    queue.claude.script = {}
    clock.advance(60)
    queue.run_all()
    assert states(queue, jobs) == [("completed", None, 1)] * 3


def test_a_lost_connection_makes_no_request_suspect(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock)
    fail_all(queue, "network")
    jobs = [queue.ask("a"), queue.ask("b")]
    ran: List[str] = []
    for _ in range(20):
        ran += queue.run_all()
        clock.advance(60)
    assert {*ran} == {"a"} and states(queue, jobs) == [("queued", None, 0)] * 2


def test_errors_that_are_the_fault_of_the_request_end_an_outage(
    new_queue: Make, clock: FakeClock
) -> None:
    """The API has answered: it can be reached."""
    queue = new_queue(clock)
    jobs = [queue.ask("a"), queue.ask("b")]
    fail_all(queue, "network")
    queue.run_all()
    queue.claude.script = {"a": lambda work, live, stop: fail_answered("invalid_request")}
    clock.advance(2)
    assert queue.worker.step() and queue.worker.current_pause() is None
    assert queue.run_all() == ["b"]
    assert states(queue, jobs) == [("error", "invalid_request", 1), ("completed", None, 1)]


def test_errors_of_the_cli_itself_do_not_end_an_outage(new_queue: Make, clock: FakeClock) -> None:
    """They say nothing of the API: the next request is the next try, not one of many."""
    queue = new_queue(clock)
    queue.ask("a")
    fail_all(queue, "network")
    queue.run_all()
    clock.advance(2)
    fail_all(queue, "cli_error")
    queue.run_all()
    pause = queue.worker.current_pause()
    assert pause and pause.reason == "network"


def test_a_held_request_can_be_cancelled_also_during_a_try(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        queue.store.jobs.fail(queue.job(job), "cancelled", "Not wanted.")
        raise cab.RunFailed("network", "away")

    queue.claude.script["a"] = run
    job, other = queue.ask("a"), queue.ask("b")
    assert queue.run_all() == ["a"] and queue.outcome(job) == ("error", "cancelled")
    clock.advance(2)
    assert queue.run_all() == ["b"] and queue.outcome(other)[0] == "completed"


def test_the_text_of_a_run_that_was_lost_in_the_middle_starts_again(
    new_queue: Make, clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["a"] = saying("half an", then=failing("network", "lost"))
    job = queue.ask("a")
    queue.run_all()
    assert (queue.job(job).generation, queue.job(job).response) == (1, None)
    queue.claude.script["a"] = saying("whole", then=lambda *_: cab.Answer("whole"))
    clock.advance(2)
    queue.run_all()
    assert queue.outcome(job) == ("completed", "whole") and queue.job(job).generation == 1


def test_a_restart_continues_the_hold_from_its_begin(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock, hold_hours=1)
    fail_all(queue, "network")
    job, began = queue.ask("a"), clock.at
    queue.run_all()
    clock.advance(1800)
    queue.worker = queue.new_worker()
    pause = queue.worker.current_pause()
    assert pause and (pause.reason, pause.since) == ("network", began)
    assert queue.run_all() == ["a"]
    clock.advance(1800)
    assert queue.run_all() == ["a"]
    assert queue.outcome(job) == ("error", "network")


# --- the owner's pause ---


def service_over(queue: Queue, clock: cab.Clock, tmp_path: Path) -> cab.Service:
    return cab.Service(queue.store, queue.notifier, clock, tmp_path, queue.worker)


def test_a_paused_queue_accepts_and_starts_nothing(
    new_queue: Make, clock: FakeClock, tmp_path: Path
) -> None:
    queue = new_queue(clock)
    service = service_over(queue, clock, tmp_path)
    service.set_paused(True)
    began, job = clock.at, queue.ask("a")
    clock.advance(100)
    # The second call changes nothing.
    service.set_paused(True)
    assert queue.run_all() == [] and states(queue, [job]) == [("queued", None, 0)]
    assert service.current_pause() == cab.Pause("paused", math.inf, began)
    queue.worker = queue.new_worker()
    assert queue.run_all() == [], "a restart does not resume it"
    service.set_paused(False)
    assert queue.run_all() == ["a"] and queue.worker.current_pause() is None


def test_a_running_job_continues_while_the_queue_is_paused(
    new_queue: Make, clock: FakeClock, tmp_path: Path
) -> None:
    queue = new_queue(clock)
    service = service_over(queue, clock, tmp_path)

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        service.set_paused(True)
        clock.advance(100)
        assert stop_reason() is None
        return cab.Answer("done")

    queue.claude.script["a"] = run
    jobs = [queue.ask("a"), queue.ask("b")]
    assert queue.run_all() == ["a"]
    assert states(queue, jobs) == [("completed", None, 1), ("queued", None, 0)]


def test_another_process_pauses_and_resumes_through_the_database(
    queue: Queue, tmp_path: Path
) -> None:
    """`pause` on the command line; the worker sees it within its round."""
    other = cab.Stores(tmp_path / "bridge.db", cab.Clock())
    with contextlib.closing(other):
        other.database.set_state("paused", str(cab.Clock.now()))
        job = queue.ask("a")
        assert queue.run_all() == []
        queue.worker.start()
        wait_until(lambda: queue.claude.maintained >= 2)
        assert queue.job(job).status == "queued"
        other.database.set_state("paused", None)
        assert queue.outcome(job) == ("completed", "Echo: a")


def test_requests_of_v1_wait_for_the_owner_for_thirty_seconds(
    new_queue: Make, clock: FakeClock, tmp_path: Path
) -> None:
    queue = new_queue(clock)
    service_over(queue, clock, tmp_path).set_paused(True)
    native, chat = queue.ask("native"), ask_chat(queue, "chat")
    clock.advance(29.5)
    maintain(queue)
    assert queue.job(chat).status == "queued"
    clock.advance(0.5)
    maintain(queue)
    assert states(queue, [native, chat]) == [("queued", None, 0), ("error", "paused", 0)]


# --- over HTTP ---

# The steps at which a run of the fake fails, as the real CLI reports it.
AWAY = {
    "fail": {
        "said": "server_error", "terminal_reason": "api_error", "stop_reason": "stop_sequence",
        "result": "API Error: Connection refused (ECONNREFUSED)",
    }
}
BUSY = {
    "fail": {
        "said": "server_error", "api_error_status": 529, "terminal_reason": "api_error",
        "result": "API Error: 529 Overloaded. This is a server-side issue, usually temporary",
    }
}
SIGNED_OUT = {
    "fail": {
        "said": "authentication_failed", "api_error_status": 401, "terminal_reason": "api_error",
        "result": "Failed to authenticate. API Error: 401 Invalid bearer token",
    }
}
OUTAGES = {"network": (AWAY, 30), "login": (SIGNED_OUT, 30), "overloaded": (BUSY, 20)}
ANSWERED = {
    # reason: (status, type of Anthropic, code of OpenAI, longest Retry-After)
    "network": (503, "api_error", "network", 60),
    "login": (503, "api_error", "auth_required", 300),
    "overloaded": (529, "overloaded_error", "overloaded", 60),
    "paused": (503, "api_error", "paused", 60),
}


def hold(running: RunningBridge, reason: str) -> str:
    """Let a native request begin a hold, or pause the queue. -> its id."""
    if reason == "paused":
        assert running.admin.post("/api/queue/pause").status == 200
        return running.admin.ask("say native")
    request = running.admin.ask(script(OUTAGES[reason][0]))
    wait_until(lambda: running.admin.poll(request).get("waitingFor") == reason)
    wait_until(lambda: running.admin.poll(request)["status"] == "queued")
    return request


@pytest.mark.parametrize("reason", [*OUTAGES, "paused"])
@both
def test_a_held_request_of_v1_is_answered_in_time_with_a_time_to_retry(
    bridge: Start, api: str, reason: str
) -> None:
    clock = Skipped()
    running = bridge(clock=clock)
    request = hold(running, reason)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, running.admin, api, talk(script(AWAY)))
        wait_until(lambda: len(rows(running.admin)) == 2)
        clock.ahead += OUTAGES.get(reason, (None, 30))[1] + 1
        answer = future.result()
    status, anthropic_kind, openai_code, longest = ANSWERED[reason]
    assert kind_of(answer, api) == (status, anthropic_kind if api == "anthropic" else openai_code)
    seconds = int(answer.headers["retry-after"])
    assert 1 <= seconds <= longest
    assert ("x-should-retry" in answer.headers) == (seconds > 60) == (reason == "login")
    assert answer.headers.get("x-should-retry", "false") == "false"
    message = answer.json["error"]["message"]
    assert {
        "network": "cannot be reached", "login": "/login", "overloaded": "overloaded",
        "paused": "owner",
    }[reason] in message
    # The native one still waits.
    body = running.admin.poll(request)
    assert (body["status"], body["attempts"]) in (("queued", 0), ("processing", 1))


@both
def test_a_stream_that_was_held_has_the_status_of_its_error(
    bridge: Start, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    """Client libraries retry a status, but not an event of a stream that has begun."""
    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.01)
    clock = Skipped()
    running = bridge(clock=clock)
    hold(running, "paused")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, running.admin, api, talk("say never", stream=True))
        wait_until(lambda: len(rows(running.admin)) == 2)
        # As time passes: the connection is kept open with heartbeats, if it must be.
        for _ in range(8):
            clock.ahead += 4
            with contextlib.suppress(AssertionError):
                wait_until(future.done, 0.1)
        answer = future.result()
    assert (answer.status, answer.headers.get("retry-after")) == (503, "60")


@pytest.mark.parametrize("reason", list(OUTAGES))
def test_polls_lists_status_and_health_say_what_is_waited_for(bridge: Start, reason: str) -> None:
    clock = Skipped()
    running = bridge(clock=clock)
    request = hold(running, reason)
    later = running.admin.ask("say later")
    for body in (running.admin.poll(request), running.admin.poll(later), *rows(running.admin)):
        assert (body["status"], body["waitingFor"], body["attempts"]) == ("queued", reason, 0)
        assert "startedAt" not in body and "error" not in body
        assert str(body["resumesAt"]) > str(cab.iso_time(clock.now()))
    assert [running.admin.poll(job)["queuePosition"] for job in (request, later)] == [1, 2]
    # The overload of one model is no hold of the queue.
    expected = None if reason == "overloaded" else reason
    assert running.admin.get("/api/status").json["queue"].get("waitingFor") == expected
    health = running.admin.get("/health")
    assert (health.status, health.json.get("waitingFor")) == (200, expected)
    assert running.admin.delete("/api/ask/" + request).status == 200
    assert running.admin.poll(request)["errorCode"] == "cancelled"


def test_a_stream_of_a_held_request_reports_the_hold_and_then_the_answer(
    bridge: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Skipped()
    running = bridge(clock=clock)
    first = {"first": str(tmp_path / "mark"), "do": [{"delta": "half "}, AWAY]}
    stream = running.admin.stream(
        "POST", "/api/ask", {"message": script(first, {"delta": "whole"}), "stream": True}
    )
    for event in stream:
        if event.kind == "queued" and "waitingFor" in event.data:
            break
    assert stream.events[-1].data["waitingFor"] == "network" and stream.text == ""
    clock.ahead += 2
    running.admin.ask("say ring")
    done = stream.rest()[-1]
    assert (done.kind, done.data["response"], stream.text) == ("completed", "whole", "whole")
    assert done.data["attempts"] == 1


def test_the_pause_of_the_queue_over_http_and_on_the_command_line(
    program: Callable[..., Program], fake_claude: Callable[..., FakeClaude], tmp_path: Path
) -> None:
    """It is remembered by a restart, and one process may resume what another one has paused."""
    first = program(claude=fake_claude().path)
    folder = ("--data-dir", str(tmp_path / "data"))
    paused = first.api.post("/api/queue/pause")
    assert (paused.status, paused.json) == (200, {"ok": True, "waitingFor": "paused"})
    request = first.api.ask("say on")
    assert first.api.poll(request) == {**first.api.poll(request), "waitingFor": "paused"}
    assert "resumesAt" not in first.api.poll(request)
    first.end(signal.SIGKILL)
    second = Api(program(claude=fake_claude().path).port, first.token)
    assert second.poll(request)["waitingFor"] == "paused"
    assert run_cli("resume", *folder, home=tmp_path).returncode == 0
    body = second.done(request)
    assert (body["response"], body["attempts"]) == ("on", 1)
    assert run_cli("pause", *folder, home=tmp_path).returncode == 0
    waits = second.ask("say later")
    assert second.poll(waits)["waitingFor"] == "paused"
    assert second.post("/api/queue/resume").json == {"ok": True}
    assert second.done(waits)["response"] == "later"


def test_only_an_admin_pauses_and_resumes(bridge: Start) -> None:
    admin = bridge().admin
    other = admin.new_token()
    for path in ("/api/queue/pause", "/api/queue/resume"):
        assert other.post(path).status == 403
        assert admin.with_token(None).post(path).status == 401
        assert admin.get(path).status == 405
    assert other.answer("say on")["response"] == "on"


def test_a_run_continues_while_the_queue_is_paused(bridge: Start, gate: Path) -> None:
    admin = bridge().admin
    runs, waits = admin.ask("hold %s" % gate), admin.ask("say later")
    wait_until(lambda: admin.poll(runs)["status"] == "processing")
    admin.post("/api/queue/pause")
    assert "waitingFor" not in admin.poll(runs)
    gate.touch()
    assert admin.done(runs)["response"] == "held"
    assert admin.poll(waits)["waitingFor"] == "paused"
    admin.post("/api/queue/resume")
    assert admin.done(waits)["response"] == "later"


# --- as the real CLI reports it (2.1.197 and 2.1.332) ---

REPLAYING = """import json, os, sys
sys.path.insert(0, %r)
import fake_claude

class Replaying(fake_claude.Fake):
    def act_lines(self, rest):
        mark, once, after = json.loads(rest)
        is_first = not os.path.exists(mark)
        open(mark, "w").close()
        for line in once if is_first else after:
            self.say(**line)
        self.last_was_error = (once if is_first else after)[-1]["is_error"]

fake_claude.Fake = Replaying
sys.exit(fake_claude.main(%r))
"""


@pytest.fixture
def replaying(fake_claude: Callable[..., FakeClaude]) -> FakeClaude:
    """Return a fake with the prompt `lines [MARK, FIRST, LATER]`.

    It prints these lines: FIRST unless the file MARK exists, which it creates.
    """
    fake = fake_claude()
    fake.script.write_text(REPLAYING % (str(TESTS), str(fake.folder)))
    return fake


Line = Dict[str, Any]


def event_line(kind: str, **event: Any) -> Line:
    event = {"type": kind, **event}
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None}


def opened(number: int) -> List[Line]:
    message = {"id": "msg_%d" % number, "usage": {"input_tokens": 10, "output_tokens": 1}}
    return [event_line("message_start", message=message)]


def delta_line(text: str) -> Line:
    return event_line("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def said_line(number: int, *blocks: Line, **more: Any) -> Line:
    message = {"id": "msg_%d" % number, "role": "assistant", "content": [*blocks]}
    return {
        "type": "assistant", "parent_tool_use_id": None,
        "message": {"stop_reason": None, **message}, **more,
    }


def text_block(text: str) -> Line:
    return {"type": "text", "text": text}


THOUGHT = {"type": "thinking", "thinking": "hmm", "signature": "c2ln"}


def closed(reason: str) -> List[Line]:
    return [
        event_line("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 7}),
        event_line("message_stop"),
    ]


def result_line(text: str, **fields: Any) -> Line:
    return {
        "type": "result", "subtype": "success", "is_error": False, "num_turns": 1,
        "stop_reason": "end_turn", "terminal_reason": "completed", "api_error_status": None,
        "result": text, "total_cost_usd": 0.001, "usage": {"output_tokens": 7}, **fields,
    }


def complete(number: int, text: str) -> List[Line]:
    """Return the lines of a complete message."""
    return [
        *opened(number), delta_line(text), said_line(number, text_block(text)), *closed("end_turn"),
    ]


WHOLE = [*complete(9, "whole"), result_line("whole")]


def failed(
    text: str,
    word: str = "server_error",
    status: Optional[int] = None,
    terminal: str = "api_error",
    retries: int = 0,
    retry_word: str = "unknown",
) -> List[Line]:
    """Return the lines of a run without an answer."""
    lines: List[Line] = [
        {
            "type": "system", "subtype": "api_retry", "attempt": n + 1, "max_retries": 4,
            "retry_delay_ms": 591, "error_status": status, "error": retry_word,
        }
        for n in range(retries)
    ]
    message = {
        "id": "x", "role": "assistant", "model": "<synthetic>", "stop_reason": "stop_sequence",
        "content": [text_block(text)],
    }
    return [
        *lines,
        {"type": "assistant", "message": message, "error": word, "parent_tool_use_id": None},
        result_line(
            text, is_error=True, stop_reason="stop_sequence", terminal_reason=terminal,
            api_error_status=status,
        ),
    ]


TEMPORARY = (
    "This is a server-side issue, usually temporary — try again in a moment. If it persists, check"
    " your inference gateway (HOST)."
)
LOST = "API Error: Connection lost mid-response. The response above may be incomplete."
LOST_BEFORE = "API Error: Connection lost before a response was produced. Try again."
ORGANIZATION = (
    "Your organization has disabled Claude subscription access for Claude Code · Use an Anthropic"
    " API key instead, or ask your admin"
)
LIMITING = (
    "API Error: Server is temporarily limiting requests (not your usage limit) · This request would"
    " exceed your rate limit"
)
REFUSED_197 = (
    "API Error: Claude Code is unable to respond to this request, which appears to violate our"
    " Usage Policy (https://www.anthropic.com/legal/aup)."
)
# What holds the queue: id -> (the reason, the lines).
HOLDING: Dict[str, Tuple[str, List[Line]]] = {
    "01 refused 197": (
        "network",
        failed(
            "API Error: Unable to connect to API (ConnectionRefused)", terminal="completed",
            retries=4,
        ),
    ),
    "01 refused 332": (
        "network",
        failed(
            "API Error: Connection refused — a firewall or proxy may be blocking it (ECONNREFUSED)",
            retries=4,
        ),
    ),
    "02 no name 332": (
        "network",
        failed(
            "API Error: Can't reach the API server — check your internet or DNS (ENOTFOUND)",
            retries=4,
        ),
    ),
    "03c proxy 407 197": (
        "network", failed("API Error: 407 status code (no body)", "unknown", 407, "completed"),
    ),
    "03c proxy 332": (
        "network",
        failed("API Error: Couldn't connect through your proxy (ERR_PROXY_TUNNEL) — the proxy"),
    ),
    "03c proxy 502 197": (
        "network",
        failed(
            "API Error: 502 status code (no body). " + TEMPORARY, "server_error", 502, "completed",
            4, "server_error",
        ),
    ),
    "04 certificate 332": (
        "network",
        failed(
            "API Error: Unable to connect to API: Self-signed certificate detected"
            " (DEPTH_ZERO_SELF_SIGNED_CERT)."
        ),
    ),
    "06j cut 332": (
        "network",
        [
            *opened(1), delta_line("first "), said_line(1, text_block("first ")),
            event_line("message_stop"), *opened(2), delta_line("block"),
            said_line(2, text_block("block")), event_line("message_stop"), *failed(LOST),
        ],
    ),
    "06m cut 332": (
        "network",
        [
            *opened(1), said_line(1, THOUGHT), event_line("message_stop"), *failed(LOST_BEFORE),
        ],
    ),
    "06j cut 197": (
        "network",
        [
            *opened(1), delta_line("first block"), said_line(1, text_block("first block")),
            result_line("first block", stop_reason=None),
        ],
    ),
    "06l cut 197": (
        "network",
        [
            *opened(1), said_line(1, THOUGHT), delta_line("partial text"),
            result_line("", stop_reason=None),
        ],
    ),
    "07 silence 197": (
        "network", failed("Request timed out", terminal="completed", retries=4),
    ),
    "08 500 332": (
        "network",
        failed("API Error: 500 boom. " + TEMPORARY, "server_error", 500, "api_error", 4),
    ),
    "08 503 page 197": (
        "network",
        failed(
            "API Error: 503 Service Unavailable. " + TEMPORARY, "server_error", 503, "completed", 4,
        ),
    ),
    "14 408 332": ("network", failed("API Error: 408 timeout", "unknown", 408, "api_error", 4)),
    "09 407 332": (
        "network", failed("API Error: 407 Proxy Authentication Required", "unknown", 407),
    ),
    "16 511 332": (
        "network",
        failed(
            "API Error: 511 Network Authentication Required. " + TEMPORARY, "server_error", 511,
        ),
    ),
    "16 login page 197": (
        "network",
        failed(
            "API Error: API returned an empty or malformed response (HTTP 200) — check for a proxy"
            " or gateway intercepting the request", "unknown", terminal="completed",
        ),
    ),
    "09 401 332": (
        "login",
        failed(
            "Failed to authenticate. API Error: 401 Invalid bearer token", "authentication_failed",
            401, "api_error", 2, "authentication_failed",
        ),
    ),
    "09 403 page 197": (
        "login",
        failed(
            "Failed to authenticate. API Error: 403 Forbidden", "authentication_failed", 403,
            "completed",
        ),
    ),
    "09 403 197": ("login", failed(ORGANIZATION, "oauth_org_not_allowed", 403, "completed")),
    "09 no login 332": (
        "login", failed("Not logged in · Please run /login", "authentication_failed"),
    ),
    "word alone": ("login", failed("Your account is on hold.", "account_on_hold")),
    "status alone": ("login", failed("API Error: 401", "unknown", 401)),
    "text alone": ("login", failed("Not logged in · Please run /login", "unknown")),
    "11 429 332": ("overloaded", failed(LIMITING, "rate_limit", 429, "api_error", 4)),
    "11 429 197": ("overloaded", failed(LIMITING, "rate_limit", 429, "completed")),
    "11 529 197": (
        "overloaded",
        failed(
            "API Error: 529 Overloaded. " + TEMPORARY, "server_error", 529, "completed", 4,
            "overloaded",
        ),
    ),
    "11 529 332": (
        "overloaded",
        failed(
            "API Error: 529 Overloaded. " + TEMPORARY, "server_error", 529, "api_error", 4,
            "overloaded",
        ),
    ),
}
# What fails the request, with the status of /v1.
FAILING: Dict[str, Tuple[str, int, List[Line]]] = {
    "10 400 332": (
        "invalid_request", 400,
        failed("API Error: 400 messages.0: something is wrong", "unknown", 400),
    ),
    "10 422 197": (
        "invalid_request", 400,
        failed("API Error: 422 unprocessable", "unknown", 422, "completed"),
    ),
    "10 404 332": (
        "model_not_found", 404,
        failed(
            "There's an issue with the selected model (claude-sonnet-5-5). It may not exist or you"
            " may not have access to it.", "model_not_found", 404,
        ),
    ),
    "10 413 197": (
        "request_too_large", 413,
        failed(
            "Request too large (max 32MB). Try with a smaller file.", "invalid_request", 413,
            "image_error",
        ),
    ),
    "10b too long 332": (
        "context_too_long", 400,
        failed("Prompt is too long", "invalid_request", 400, "prompt_too_long"),
    ),
    "10c credit 332": (
        "cli_error", 500, failed("Credit balance is too low", "billing_error", 400),
    ),
    "10d 402 197": (
        "cli_error", 500, failed("API Error: 402 billing", "unknown", 402, "completed"),
    ),
}


def lines_prompt(mark: Path, first: List[Line], later: Optional[List[Line]] = None) -> str:
    return "lines " + json.dumps([str(mark), first, first if later is None else later])


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "BACK_OFF_SECONDS", (0.01,))
    monkeypatch.setattr(cab, "LOGIN_RETRY_SECONDS", 0.01)


def test_what_the_request_did_not_cause_does_not_fail_it(
    bridge: Start, replaying: FakeClaude, no_waiting: None, tmp_path: Path
) -> None:
    running = bridge(replaying)
    for number, (shape, (reason, lines)) in enumerate(HOLDING.items()):
        before = len(running.log)
        body = running.admin.answer(lines_prompt(tmp_path / ("mark-%d" % number), lines, WHOLE))
        assert (body.get("response"), body["attempts"]) == ("whole", 1), (shape, body)
        log = "\n".join(running.log[before:])
        assert log.count("%s: " % reason) == log.count(" waits (") == 1, (shape, log)


@both
def test_what_the_request_caused_fails_it_at_once(
    bridge: Start, replaying: FakeClaude, tmp_path: Path, api: str
) -> None:
    admin = bridge(replaying).admin
    for shape, (code, status, lines) in FAILING.items():
        prompt = lines_prompt(tmp_path / "mark", lines)
        body = admin.answer(prompt)
        assert (body.get("errorCode"), body["attempts"]) == (code, 1), (shape, body)
        assert body["error"] == lines[-1]["result"]
        answer = post(admin, api, talk(prompt))
        assert answer.status == status, (shape, answer)
        assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
        if api == "openai":
            assert answer.json["error"]["code"] in (code, "context_length_exceeded"), shape
    assert admin.answer("say on")["response"] == "on"


def test_while_the_cli_itself_retries_polls_say_why(
    bridge: Start, gate: Path, tmp_path: Path
) -> None:
    admin = bridge().admin
    for number, (status, reason) in enumerate(((500, "network"), (529, "overloaded"))):
        opened_gate = tmp_path / ("gate-%d" % number)
        request = admin.ask(
            script({"retry": status}, {"wait": str(opened_gate)}, {"message": True}, {"delta": "a"})
        )
        wait_until(lambda: "waitingFor" in admin.poll(request))
        body = admin.poll(request)
        assert (body["status"], body["waitingFor"]) == ("processing", reason)
        opened_gate.touch()
        body = admin.done(request)
        assert body["response"] == "a" and "waitingFor" not in body


def test_a_run_that_ends_while_the_cli_retries_does_not_fail_the_request(
    bridge: Start, no_waiting: None, tmp_path: Path
) -> None:
    """Nothing was written: an API that never answers must not use up the request's time."""
    running = bridge(silence_seconds=0.3)
    first = {"first": str(tmp_path / "mark"), "do": [{"retry": 502}, {"wait": "/never"}]}
    body = running.admin.answer(script(first, {"delta": "whole"}))
    assert (body.get("response"), body["attempts"]) == ("whole", 1), body


# An answer that was cut, and that 2.1.332 continues after a whole block.
CUT_MARK = {
    "type": "user", "parent_tool_use_id": None,
    "message": {
        "role": "user",
        "content": [text_block("Your response above was cut off mid-stream. Resume directly.")],
    },
}
CONTINUED = [
    *opened(1), delta_line("one "), said_line(1, text_block("one ")), event_line("message_stop"),
    CUT_MARK, *complete(2, "two"), result_line("two", num_turns=2),
]
# After a part of a block it begins again.
REPEATED = [
    *opened(1), delta_line("one "), event_line("message_stop"), *complete(2, "one two"),
    result_line("one two"),
]
AFTER_A_THOUGHT = [
    *opened(1), said_line(1, THOUGHT), delta_line("partial"), event_line("message_stop"), CUT_MARK,
    *complete(2, "one two"), result_line("one two", num_turns=2),
]
TWICE_CUT = [
    *opened(1), delta_line("one "), said_line(1, text_block("one ")), event_line("message_stop"),
    CUT_MARK,
    *opened(2), delta_line("tw"), said_line(2, text_block("tw")), event_line("message_stop"),
    CUT_MARK, *complete(3, "o"), result_line("o", num_turns=3),
]


@pytest.mark.parametrize(
    "lines, text",
    [
        (CONTINUED, "one two"), (REPEATED, "one two"), (AFTER_A_THOUGHT, "one two"),
        (TWICE_CUT, "one two"),
    ],
    ids=["continued", "repeated", "after a thought", "twice"],
)
def test_the_parts_of_an_answer_that_was_cut_are_joined(
    bridge: Start, replaying: FakeClaude, tmp_path: Path, lines: List[Line], text: str
) -> None:
    admin = bridge(replaying).admin
    prompt = lines_prompt(tmp_path / "mark", lines)
    stream = admin.stream("POST", "/api/ask", {"message": prompt, "stream": True})
    end = stream.rest()[-1]
    assert (end.data["response"], stream.text) == (text, text), stream.events
    for api in PATHS:
        assert words(post(admin, api, talk(prompt))) == text
        data = post(admin, api, talk(prompt, stream=True)).data
        # A text that was sent cannot be taken back; a part that begins again is sent after it.
        assert streamed(data).endswith(text)


def refusal(text: str, word: str = REFUSED_197) -> List[Line]:
    """Return the lines of a refusal after this text."""
    lines = [*opened(1)]
    if text:
        lines += [delta_line(text), said_line(1, text_block(text))]
    message = {
        "id": "x", "role": "assistant", "model": "<synthetic>", "stop_reason": "refusal",
        "content": [text_block(word)],
    }
    return [
        *lines,
        {
            "type": "assistant", "parent_tool_use_id": None, "message": message,
            "error": "invalid_request",
        },
        *closed("refusal"),
        result_line(word, is_error=True, stop_reason="refusal", terminal_reason="api_error"),
    ]


@pytest.mark.parametrize("text", ["", "I will not "])
def test_a_refusal_of_the_model_is_an_answer_on_v1_and_an_error_on_api(
    bridge: Start, replaying: FakeClaude, tmp_path: Path, text: str
) -> None:
    admin = bridge(replaying).admin
    prompt = lines_prompt(tmp_path / "mark", refusal(text))
    body = admin.answer(prompt)
    assert (body["errorCode"], body["error"]) == ("refused", REFUSED_197) and body["attempts"] == 1
    message = post(admin, "anthropic", talk(prompt))
    assert (message.status, message.json["stop_reason"]) == (200, "refusal")
    assert "".join(block["text"] for block in message.json["content"]) == text
    choice = post(admin, "openai", talk(prompt)).json["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == text
    data = post(admin, "anthropic", talk(prompt, stream=True)).data
    assert streamed(data) == text
    reasons = [
        data["delta"]["stop_reason"] for kind, data in events(data) if kind == "message_delta"
    ]
    assert reasons == ["refusal"]
    data = post(admin, "openai", talk(prompt, stream=True)).data
    assert streamed(data) == text
    chunks = [chunk for _, chunk in events(data) if isinstance(chunk, dict) and chunk["choices"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    # It holds nothing, and the next turn is not told of it.
    assert admin.get("/api/status").json["queue"].get("waitingFor") is None
    assert admin.answer("say on")["response"] == "on"


def test_a_relapse_of_the_api_fails_one_suspect_at_most(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock)
    fail_all(queue, "network", is_answered=True)
    jobs = [queue.ask(message) for message in "abcdef"]
    for _ in range(7200):
        queue.run_all()
        clock.advance(1)
    assert {status for status, *_ in states(queue, jobs)} == {"queued"}
    answers = ["one"]

    def answer_once(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        return echo(work, live, stop_reason) if answers and answers.pop() else fail_answered()

    script_all(queue, answer_once)
    for _ in range(120):
        queue.run_all()
        clock.advance(1)
    ended = sorted(status for status, *_ in states(queue, jobs))
    assert ended == ["completed", "error"] + 4 * ["queued"]


def test_kills_in_the_tries_of_an_outage_are_no_attempts(new_queue: Make, clock: FakeClock) -> None:
    queue = new_queue(clock)
    fail_all(queue, "network")
    job = queue.ask("a")
    for _ in range(3):
        queue.run_all()
        clock.advance(100)
        assert queue.worker._claim()
        assert queue.store.jobs.recover() == (1, 0)
        queue.worker = queue.new_worker()
    assert states(queue, [job]) == [("queued", None, 0)]
