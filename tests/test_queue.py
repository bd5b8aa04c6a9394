"""The queue: the hub wakes who waits, and the worker runs the jobs in order, whatever a run does to it."""
from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab

# --- hub ---


def test_a_wake_between_the_look_and_the_wait_is_not_lost() -> None:
    hub = cab.Notifier()
    with hub.subscribe("job") as bell:
        bell.clear()
        hub.notify("job")
        assert bell.wait(10)


def test_a_wake_reaches_all_who_watch_that_key_and_nobody_else() -> None:
    hub = cab.Notifier()
    with hub.subscribe("job") as first, hub.subscribe("job") as second, hub.subscribe("other") as other:
        hub.notify("job")
        assert (first.wait(0), second.wait(0), other.wait(0)) == (True, True, False)
    hub.notify("job")                                      # nobody watches: nothing happens


def test_a_bell_of_several_keys_rings_for_each_of_them() -> None:
    hub = cab.Notifier()
    with hub.subscribe("job") as narrow, hub.subscribe("job", cab.Notifier.TEXT + "job") as wide:
        rung = []
        for key in ("job", cab.Notifier.TEXT + "job", "other"):
            for bell in (narrow, wide):
                bell.clear()
            hub.notify(key)
            rung.append((narrow.wait(0), wide.wait(0)))
    assert rung == [(True, True), (False, True), (False, False)]


def test_watching_leaves_nothing_behind() -> None:
    hub = cab.Notifier()
    with pytest.raises(ZeroDivisionError), hub.subscribe("job"), hub.subscribe("job", "other"), hub.subscribe("other", "third"):
        raise ZeroDivisionError
    assert hub._waiters == {}


@pytest.mark.parametrize("keys", [("job",), ("job", "other")])
def test_closing_wakes_all_and_nobody_waits_any_more(keys: Sequence[str]) -> None:
    hub = cab.Notifier()
    with hub.subscribe(*keys) as before:
        hub.close()
        assert before.wait(0) and hub.is_closed
    with hub.subscribe(*keys) as after:
        assert after.wait(0)


def test_threads_that_look_again_after_each_wake_see_the_last_state() -> None:
    hub, state, seen = cab.Notifier(), [0], []

    def follow() -> None:
        with hub.subscribe("job") as bell:
            while True:
                bell.clear()
                if state[0] == 500:
                    return seen.append(state[0])
                assert bell.wait(10)

    threads = [threading.Thread(target=follow, name="follower") for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(1, 501):
        state[0] = number
        hub.notify("job")
    for thread in threads:
        thread.join(10)
    assert seen == [500] * 8


# --- worker ---

Run = Callable[[cab.RunRequest, cab.LiveText, Callable[[], Optional[str]]], cab.Answer]


def echo(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
    return cab.Answer("Echo: " + work.message)


class Scripted:
    """Stands in for ClaudeCli: what a message does is in `script`; any other is echoed. note_limits: of the run that goes on."""
    spares, has_terminating = 0, False

    def __init__(self) -> None:
        self.script: Dict[str, Run] = {}
        self.seen: List[cab.RunRequest] = []
        self.on_rate_limits: Callable[[cab.RateLimitStatus], None] = lambda limits: None
        self.prepared = self.tended = 0
        self.is_known: Optional[Callable[[str], bool]] = None
        self.closed = 0

    def run(self, work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]],
            on_rate_limits: Callable[[cab.RateLimitStatus], None]) -> cab.Answer:
        self.seen.append(work)
        self.on_rate_limits = on_rate_limits
        return self.script.get(work.message, echo)(work, live, stop_reason)

    def prepare(self) -> None:
        self.prepared += 1

    def tend(self) -> None:
        self.tended += 1

    def evict_unless(self, is_known: Callable[[str], bool], is_owner: Callable[[str], bool]) -> None:
        self.is_known = is_known

    def close(self) -> None:
        self.closed += 1


class Queue:
    """A worker over a real store, with nothing behind it."""

    def __init__(self, path: Path, clock: cab.Clock, **settings: Any) -> None:
        self.store, self.hub, self.claude, self.log = cab.Database(path, clock), cab.Notifier(), Scripted(), []  # type: ignore[var-annotated]
        self._clock, self._config = clock, cab.Config(**settings)
        self.worker = self.new_worker()
        self.token = self.store.add_token(cab.NewToken("app"), cab.new_token())

    def new_worker(self) -> cab.Worker:
        """As the next start of the bridge makes it."""
        return cab.Worker(self.store, self.claude, self.hub, self._clock, self.log.append, self._config)  # type: ignore[arg-type]

    def run_all(self) -> List[str]:
        """Steps until there is nothing to do. -> the messages that ran."""
        before = len(self.claude.seen)
        while self.worker.step():
            assert len(self.claude.seen) < before + 20, "there is always something to do"
        return [work.message for work in self.claude.seen[before:]]

    def ask(self, message: str, **fields: Any) -> str:
        job_id = self.store.enqueue(self.token.id, cab.Ask(message, **fields))[0].id
        self.hub.notify(cab.Notifier.QUEUE)
        return job_id

    def job(self, job_id: str) -> cab.Job:
        found = self.store.job(job_id)
        assert found is not None
        return found

    def outcome(self, job_id: str) -> Tuple[str, Optional[str]]:
        """(status, the answer or the error's code), once it is finished."""
        job = wait_until(lambda: self.job(job_id).is_finished and self.job(job_id))
        return job.status, job.response if job.status == "completed" else job.error_code


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[..., Queue]]:
    """lines(clock, **settings) -> a Queue; at most one in a test."""
    made: List[Queue] = []

    def make(clock: cab.Clock, **settings: Any) -> Queue:
        made.append(Queue(tmp_path / "bridge.db", clock, **settings))
        return made[-1]

    yield make
    for each in made:
        each.worker.close()
        each.store.close()


@pytest.fixture
def line(lines: Callable[..., Queue]) -> Queue:
    """A Queue by the real clock."""
    return lines(cab.Clock())


class Impatient(threading.Event):
    """The worker's stop, for which a second is short: after an error it tries again soon."""

    def wait(self, timeout: Optional[float] = None) -> bool:
        return super().wait(timeout and timeout / 20)


def failing(code: str, text: str, resets_at: Optional[float] = None, is_model_limit: bool = False) -> Run:
    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        raise cab.RunFailed(code, text, resets_at, is_model_limit)
    return run


def refused(resets_at: Optional[float]) -> Run:
    """A run that the plan's limit refuses."""
    return failing("usage_limit", "You've hit your session limit", resets_at)


def saying(*texts: str, then: Run = echo) -> Run:
    """A run whose text comes in these deltas."""
    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        live.begin("model")
        for text in texts:
            live.add(text)
        return then(work, live, stop_reason)
    return run


def until_stopped(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
    reason = wait_until(stop_reason)
    raise cab.RunFailed(reason, cab.RUN_ERRORS[reason])


def test_jobs_run_in_order_and_a_step_without_one_does_nothing(line: Queue) -> None:
    jobs = [line.ask(message) for message in ("a", "b", "c")]
    assert [line.worker.step() for _ in range(4)] == [True, True, True, False]
    assert [work.message for work in line.claude.seen] == ["a", "b", "c"]
    assert [line.outcome(job) for job in jobs] == [("completed", "Echo: " + message) for message in ("a", "b", "c")]


def test_a_run_is_told_what_was_asked_and_what_the_token_may(line: Queue) -> None:
    line.ask("plain")
    line.ask("full", model="haiku", system_prompt="Be brief.", json_schema='{"type":"object"}', effort="low")
    line.token = line.store.add_token(cab.NewToken("tools", tools=("Read",)), cab.new_token(), "/srv/work")
    line.ask("tools")
    while line.worker.step():
        pass
    assert [work.setup for work in line.claude.seen] == [
        cab.SessionConfig(cab.SYSTEM_PROMPT), cab.SessionConfig("Be brief.", "haiku", '{"type":"object"}', "low"),
        cab.SessionConfig(cab.SYSTEM_PROMPT, tools=("Read",), workspace="/srv/work")]
    assert {work.conversation for work in line.claude.seen} == {None}


def test_a_conversation_is_continued_by_session_and_its_history_is_at_hand(line: Queue) -> None:
    line.claude.script["one"] = lambda work, live, stop_reason: cab.Answer("1", session_id="s1", spent_usd=0.5)
    for message in ("one", "two"):
        line.ask(message, conversation="trip")
    line.ask("else", conversation="other")
    line.run_all()
    first, second, other = line.claude.seen
    assert (first.session_id, first.spent_usd, first.history()) == (None, 0.0, [])
    assert (second.session_id, second.spent_usd, second.history()) == ("s1", 0.5, [cab.HistoryTurn("one", "1")])
    assert first.conversation and first.conversation == second.conversation != other.conversation


@pytest.mark.parametrize("code", [code for code in cab.RUN_ERRORS if code not in ("interrupted", "usage_limit")])
def test_a_run_that_failed_is_stored_with_its_code_and_words(line: Queue, code: str) -> None:
    line.claude.script["bad"] = failing(code, "why it failed")
    job = line.ask("bad")
    assert line.worker.step()
    assert (line.outcome(job), line.job(job).error, line.job(job).attempts) == (("error", code), "why it failed", 1)


def test_secrets_in_the_cli_s_words_reach_neither_the_log_nor_the_caller(line: Queue) -> None:
    secret = cab.new_token()
    line.claude.script["bad"] = failing("cli_error", "key %s refused" % secret)
    job = line.ask("bad")
    line.worker.step()
    assert secret not in str(line.job(job).error) + "".join(line.log) and "cab-" in str(line.job(job).error)


def test_who_waits_is_woken_at_the_start_and_at_the_end_of_a_run(line: Queue) -> None:
    job = line.ask("hi")
    with line.hub.subscribe(job) as bell:
        def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
            assert bell.wait(0) and line.job(job).status == "processing"
            bell.clear()
            return cab.Answer("ok")

        line.claude.script["hi"] = run
        line.worker.step()
        assert bell.wait(0) and line.job(job).status == "completed"


def test_the_text_so_far_can_be_read_while_a_job_runs_and_not_after(line: Queue) -> None:
    job, found = line.ask("hi"), []

    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        for text in ("Hé", "llo"):
            live.add(text)
            running = line.worker.live(job)
            found.append(running and running.read())
        assert line.worker.running and line.worker.running[0] == job
        return cab.Answer("Héllo")

    line.claude.script["hi"] = run
    line.worker.step()
    assert found == ["Hé", "Héllo"] and line.worker.live(job) is None and line.worker.running is None


@pytest.mark.parametrize("deltas, answer, generation", [
    (("Hé", "llo"), "Héllo", 0),
    (("Hé",), "Héllo", 0),                                   # broken off
    ((), "Héllo", 0),
    (("Bye",), "Héllo", 1),
    (("Hé", "llo"), "", 1),
    (("smile \ud83d", "\ude00."), "smile \U0001f600.", 0),
    (("half \ud83d",), "half \ud83d", 0),
])
def test_a_text_can_be_followed_from_the_run_into_what_is_stored(line: Queue, deltas: Sequence[str], answer: str, generation: int) -> None:
    running, stored = cab.TextCursor(0), cab.TextCursor(0)   # one reader holds the live text to its end, the other reads the row then
    told: List[List[cab.JobEvent]] = [[], []]
    texts: List[cab.LiveText] = []

    def listen(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        texts.append(live)
        told[0] += live.events_since(running)
        told[1] += live.events_since(stored)
        return cab.Answer(answer)

    line.claude.script["hi"] = saying(*deltas, then=listen)
    job = line.ask("hi")
    with line.hub.subscribe(cab.Notifier.TEXT + job) as bell:
        line.worker.step()
        assert bell.wait(0)
    row = line.job(job)
    told[0] += texts[0].events_since(running)
    told[1] += stored.read(row.generation, lambda offset: (row.response or "")[offset:], row.model)
    for events in told:
        text = ""
        for event in events:
            text = "" if event.kind == "started" else text + event.text
            assert event.offset == len(text)
        assert text == row.response == cab.replace_surrogates(answer)
        assert [event.kind for event in events].count("started") == 1 + generation
    assert row.generation == texts[0].generation == generation


def test_jobs_are_run_by_a_thread_of_that_name_as_they_come(line: Queue) -> None:
    line.claude.script["who"] = lambda work, live, stop_reason: cab.Answer(threading.current_thread().name)
    line.worker.start()
    wait_until(lambda: line.claude.prepared)
    assert line.outcome(line.ask("who")) == ("completed", "worker")
    assert line.outcome(line.ask("again")) == ("completed", "Echo: again")


def test_after_a_run_the_next_process_is_made_ready_at_once(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)                                         # whose second never ends
    q.worker.start()
    try:
        for n in (1, 2):
            wait_until(lambda: q.claude.prepared == n)
            q.outcome(q.ask("hello"))
        wait_until(lambda: q.claude.prepared == 3)
    finally:
        q.worker.close()


def test_an_unexpected_error_is_tried_again_then_given_up_and_the_worker_lives_on(line: Queue) -> None:
    line.claude.script["bug"] = lambda work, live, stop_reason: cab.Answer(str(1 / 0))
    line.worker._stopping = Impatient()
    jobs = [line.ask(message) for message in ("bug", "next")]
    line.worker.start()
    assert [line.outcome(job) for job in jobs] == [("error", "interrupted"), ("completed", "Echo: next")]
    assert [work.message for work in line.claude.seen] == ["bug", "bug", "next"] and line.job(jobs[0]).attempts == cab.JOB_ATTEMPTS
    assert line.worker.is_alive and any("ZeroDivisionError" in text for text in line.log)
    wait_until(lambda: line.worker.running is None)          # a moment after its answer is stored
    assert line.worker.live(jobs[0]) is None


def test_a_job_is_not_left_behind_when_the_disk_was_full_at_its_end(line: Queue) -> None:
    # Neither the answer nor, later, the recovery could be written: the job must be taken up once writing works again.
    line.worker._stopping = Impatient()
    statements: List[str] = []

    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        line.claude.script.clear()
        line.store._db.execute("PRAGMA query_only = ON")
        line.store._db.set_trace_callback(statements.append)
        return cab.Answer("lost")

    line.claude.script["hi"] = run
    job = line.ask("hi")
    line.worker.start()
    wait_until(lambda: list(statements).count("BEGIN IMMEDIATE") >= 2)               # the recovery was tried, too
    line.store._db.execute("PRAGMA query_only = OFF")
    line.store._db.set_trace_callback(None)
    wait_until(lambda: line.job(job).is_finished)
    assert line.outcome(job) == ("completed", "lost")


def test_a_job_whose_token_is_revoked_is_stopped_and_the_next_one_runs(line: Queue) -> None:
    line.claude.script["long"] = until_stopped
    job = line.ask("long")
    line.worker.start()
    wait_until(lambda: line.worker.running)
    line.store.delete_token(line.token.id)
    wait_until(lambda: not line.worker.running)
    assert line.store.job(job) is None and any("cancelled" in text for text in line.log)
    line.token = line.store.add_token(cab.NewToken("other"), cab.new_token())
    assert line.outcome(line.ask("next")) == ("completed", "Echo: next")


def test_an_answer_that_came_too_late_is_not_announced_as_completed(line: Queue) -> None:
    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        line.store.delete_token(line.token.id)
        return cab.Answer("late")

    line.claude.script["hi"] = run
    line.ask("hi")
    assert line.worker.step() and not any("completed" in text for text in line.log)


@pytest.mark.parametrize("said, generation", [((), 0), (("half",), 1)])
def test_closing_puts_a_running_job_back_without_counting_the_attempt(line: Queue, monkeypatch: pytest.MonkeyPatch,
                                                                      said: Sequence[str], generation: int) -> None:
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.0)
    line.claude.script["long"] = saying(*said, then=until_stopped)
    job, waits = line.ask("long"), line.ask("waits")
    line.worker.start()
    wait_until(lambda: line.worker.running)
    line.worker.close()
    found = line.job(job)
    assert (found.status, found.attempts, found.started_at) == ("queued", 0, None) and line.store.places(found) == (1, 1)
    assert found.generation == generation                        # who read some of its text is told that it begins anew
    assert line.job(waits).status == "queued" and line.claude.closed == 1 and not line.worker.is_alive


def test_after_a_start_a_job_goes_on_counting_how_often_its_text_began_anew(line: Queue) -> None:
    line.claude.script["hi"] = saying("half", then=failing("interrupted", "end"))
    job, cursor, told = line.ask("hi"), cab.TextCursor(4), []
    line.worker.step()
    line.worker = line.new_worker()

    def listen(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        told.extend(live.events_since(cursor))
        return cab.Answer("Hello")

    line.claude.script["hi"] = saying("Hel", then=listen)
    line.worker.step()
    assert told == [cab.JobEvent("started", 0, model="model"), cab.JobEvent("delta", 3, "Hel")]
    assert (line.outcome(job), line.job(job).generation, line.job(job).attempts) == (("completed", "Hello"), 1, 1)


def test_closing_lets_a_running_job_finish_and_begins_no_other(line: Queue) -> None:
    is_closing = threading.Event()
    line.claude.script["short"] = lambda work, live, stop_reason: cab.Answer("done, %s" % is_closing.wait(10))
    job, waits = line.ask("short"), line.ask("waits")
    line.worker.start()
    wait_until(lambda: line.worker.running)
    closer = threading.Thread(target=line.worker.close, name="closer")
    closer.start()
    wait_until(line.worker._stopping.is_set)
    is_closing.set()
    closer.join()
    assert line.outcome(job) == ("completed", "done, True") and line.job(waits).status == "queued"


def test_closing_twice_or_without_a_start_is_fine(line: Queue) -> None:
    line.worker.close()
    assert not line.worker.is_alive and line.claude.closed == 0          # nothing was started, so nothing is closed
    line.worker.close()


def test_closing_an_idle_worker_ends_its_children_once(line: Queue) -> None:
    line.worker.start()
    wait_until(lambda: line.claude.is_known)
    line.worker.close()
    line.worker.close()
    assert line.claude.closed == 1


def test_an_idle_worker_deletes_old_jobs_and_says_which_conversations_are_left(line: Queue, tmp_path: Path) -> None:
    past = FakeClock(cab.Clock.now() - 8 * 86_400)
    earlier = cab.Database(tmp_path / "bridge.db", past)
    old = earlier.enqueue(line.token.id, cab.Ask("old"))[0]
    earlier.complete(earlier.claim() or old, cab.Answer("ok"))
    earlier.close()
    fresh, other = line.ask("fresh", conversation="trip"), line.ask("other", conversation="other")
    line.worker.start()
    wait_until(lambda: line.store.job(old.id) is None)
    is_known = wait_until(lambda: line.claude.is_known)
    assert line.outcome(fresh)[0] == line.outcome(other)[0] == "completed"
    keys = [str(work.conversation) for work in line.claude.seen]
    assert [is_known(key) for key in (*keys, "trip", line.token.id)] == [True, True, False, False]
    line.store.delete_conversation(line.token.id, "trip")
    assert [is_known(key) for key in keys] == [False, True]


def test_a_conversation_begun_afresh_after_it_was_deleted_is_another_one(line: Queue) -> None:
    for message in ("one", "two"):
        line.ask(message, conversation="trip")
        line.run_all()
        line.store.delete_conversation(line.token.id, "trip")
    first, second = line.claude.seen
    assert first.conversation != second.conversation and list(second.history()) == []


def test_the_house_is_kept_also_during_a_run(lines: Callable[..., Queue], clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "MAINTENANCE_SECONDS", 1.0)
    q = lines(clock)
    found = []

    def look(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        for _ in range(25):
            clock.advance(0.1)
            assert stop_reason() is None
        found.append((q.claude.tended, q.claude.prepared, q.claude.is_known is not None))
        return cab.Answer("ok")

    q.claude.script["long"] = look
    q.ask("long")
    q.worker.step()
    assert found == [(25, 3, True)]                          # those that leave are seen to each time, all else once a second


def test_an_idle_worker_looks_often_after_those_that_leave(line: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cab, "MAINTENANCE_SECONDS", 60.0)
    line.claude.has_terminating = True
    line.worker.start()
    wait_until(lambda: line.claude.tended >= 30)             # else it would look once a round


def test_a_locked_database_does_not_end_a_run(line: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: Any) -> None:
        raise cab.Unavailable()

    def look(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        with monkeypatch.context() as patch:
            patch.setattr(line.store, "job_status", locked)
            patch.setattr(line.store, "save_plan_limits", locked)
            line.claude.on_rate_limits(limits())
            return cab.Answer(str(stop_reason()))

    line.claude.script["hi"] = look
    job = line.ask("hi")
    line.worker.step()
    assert line.outcome(job) == ("completed", "None") and line.store.windows() == []
    line.claude.on_rate_limits(limits())                        # what could not be written is written when it is told again
    assert len(line.store.windows()) == 2


def test_a_job_that_was_cancelled_while_it_ran_stays_so(line: Queue) -> None:
    line.claude.script["long"] = until_stopped
    job = line.ask("long")
    line.worker.start()
    wait_until(lambda: line.worker.running)
    line.store.fail(line.job(job), "cancelled", "Not wanted.")
    assert line.outcome(line.ask("next")) == ("completed", "Echo: next")
    assert (line.outcome(job), line.job(job).error) == (("error", "cancelled"), "Not wanted.")


# --- the plan's limits ---

class TwoClocks(FakeClock):
    """One that can be set without time passing, as a person or a suspended computer does it."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 5.0

    def monotonic(self) -> float:
        return self.passed


def limits(utilization: Optional[float] = None, seen_at: float = 0.0, **fields: Any) -> cab.RateLimitStatus:
    return cab.RateLimitStatus(windows=(cab.RateLimitWindow("five_hour", "allowed", utilization, 2e9, seen_at),
                               cab.RateLimitWindow("overage", "rejected", None, None, seen_at)), **fields)


def test_a_refused_job_waits_at_the_head_until_the_limit_resets(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.claude.script["one"] = saying("You've", then=refused(clock.at + 3600))
    jobs = [q.ask(message) for message in ("one", "two", "three")]
    assert q.run_all() == ["one"] and q.worker.rest() == cab.Pause("usage_limit", clock.at + 3600)
    row = q.job(jobs[0])
    assert (row.status, row.attempts, row.started_at, row.error, row.generation) == ("queued", 0, None, None, 1)
    assert q.store.places(row) == (1, 1)
    clock.advance(3599)
    assert q.run_all() == [] and [q.job(job).status for job in jobs] == ["queued"] * 3
    q.claude.script.clear()
    clock.advance(1)
    assert q.worker.rest() is None and q.run_all() == ["one", "two", "three"]
    assert [(q.outcome(job), q.job(job).attempts) for job in jobs] == [
        (("completed", "Echo: " + message), 1) for message in ("one", "two", "three")]


def test_a_job_may_be_refused_as_often_as_it_takes(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.claude.script["one"] = refused(None)
    job = q.ask("one")
    for _ in range(cab.JOB_ATTEMPTS + 2):
        assert q.run_all() == ["one"]
        clock.advance(cab.DEFAULT_PAUSE_SECONDS)
    assert (q.job(job).status, q.job(job).attempts) == ("queued", 0)


@pytest.mark.parametrize("resets_in, seconds", [
    (3600, 3600), (None, 900), (0, 5), (-60, 5), (-61, 900), (-86_400, 900), (8 * 86_400 + 1, 8 * 86_400), (1e9, 8 * 86_400)])
def test_a_rest_is_neither_without_end_nor_none(lines: Callable[..., Queue], clock: FakeClock, resets_in: Optional[float],
                                                seconds: float) -> None:
    q = lines(clock)
    q.claude.script["one"] = refused(None if resets_in is None else clock.at + resets_in)
    q.ask("one")
    q.run_all()
    assert q.worker.rest() == cab.Pause("usage_limit", clock.at + seconds)
    assert any(str(cab.iso_time(clock.at + seconds)) in text for text in q.log)


@pytest.mark.parametrize("which", ["at", "passed"])
def test_a_rest_ends_with_whichever_clock_says_so_first(lines: Callable[..., Queue], which: str) -> None:
    clock = TwoClocks()
    q = lines(clock)
    q.claude.script["one"] = refused(clock.at + 3600)
    q.ask("one")
    q.run_all()
    for seconds, rests in ((3599, True), (1, False)):
        setattr(clock, which, getattr(clock, which) + seconds)
        assert bool(q.worker.rest()) == rests and bool(q.run_all()) != rests


@pytest.mark.parametrize("model", ["opus", None])
def test_the_limit_of_one_model_keeps_the_others_going(lines: Callable[..., Queue], clock: FakeClock, model: Optional[str]) -> None:
    q = lines(clock)
    q.claude.script["one"] = failing("usage_limit", "You've hit your Opus limit", clock.at + 86_400, True)
    one, two = q.ask("one", model=model), q.ask("two", model=model)
    other = q.ask("other", model="haiku")
    assert q.run_all() == ["one", "other"] and q.outcome(other)[0] == "completed"
    assert q.worker.rest() is None and q.worker.rest("haiku") is None and q.worker.rest(model) == cab.Pause("usage_limit", clock.at + 86_400)
    assert [q.job(job).status for job in (one, two)] == ["queued"] * 2 and q.run_all() == []
    assert any("model %s rest" % (model or "that is the default") in text for text in q.log)
    q.claude.script.clear()
    clock.advance(86_400)
    assert q.run_all() == ["one", "two"]


def test_nothing_is_claimed_during_a_rest_and_all_goes_on_by_itself_after_it(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.claude.script["one"] = refused(clock.at + 3600)
    one = q.ask("one")
    q.worker.start()
    wait_until(lambda: q.worker.rest() and not q.worker.running)
    two, rounds = q.ask("two"), q.claude.tended

    def looked_again() -> bool:
        q.hub.notify(cab.Notifier.QUEUE)
        return q.claude.tended >= rounds + 2

    wait_until(looked_again)
    assert [q.job(job).status for job in (one, two)] == ["queued", "queued"] and len(q.claude.seen) == 1
    q.claude.script.clear()
    clock.advance(3600)
    assert [q.outcome(job) for job in (one, two)] == [("completed", "Echo: one"), ("completed", "Echo: two")]
    assert [work.message for work in q.claude.seen] == ["one", "one", "two"]


def test_a_resting_worker_is_closed_at_once(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.claude.script["one"] = refused(None)
    job = q.ask("one")
    q.worker.start()
    wait_until(lambda: q.worker.rest() and not q.worker.running)
    q.worker.close()
    assert not q.worker.is_alive and q.claude.closed == 1 and q.job(job).status == "queued"


def test_a_refused_job_that_was_cancelled_meanwhile_does_not_come_back(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)

    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        q.store.fail(q.job(job), "cancelled", "Not wanted.")
        return refused(None)(work, live, stop_reason)

    q.claude.script["one"] = run
    job = q.ask("one")
    q.run_all()
    assert q.outcome(job) == ("error", "cancelled") and q.worker.rest()


@pytest.mark.parametrize("plan_only, ran", [(True, ["one"]), (False, ["one", "two"])])
def test_with_plan_only_paid_usage_begins_a_rest_after_that_answer(lines: Callable[..., Queue], clock: FakeClock, plan_only: bool,
                                                                   ran: List[str]) -> None:
    q = lines(clock, plan_only=plan_only)

    def run(work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        q.claude.on_rate_limits(limits(is_using_overage=True, resets_at=clock.at + 100))
        assert stop_reason() is None
        return cab.Answer("paid")

    q.claude.script["one"] = run
    one, two = q.ask("one"), q.ask("two")
    assert q.run_all() == ran and q.outcome(one) == ("completed", "paid")
    assert q.worker.rest() == (cab.Pause("usage_limit", clock.at + 100) if plan_only else None)
    clock.advance(100)
    q.run_all()
    assert q.outcome(two) == ("completed", "Echo: two")


def test_within_the_plan_nothing_rests_with_plan_only(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock, plan_only=True)
    q.ask("one")
    q.run_all()
    q.claude.on_rate_limits(limits(0.9, resets_at=clock.at + 100))
    assert q.worker.rest() is None and len(q.store.windows()) == 2


def test_the_windows_of_the_plan_are_kept_and_not_written_anew_for_each_run(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.ask("one")
    q.run_all()
    began, stored = clock.at, []
    for seconds, utilization in ((0, None), (30, None), (60, None), (61, None), (62, 0.9)):
        clock.at = began + seconds
        q.claude.on_rate_limits(limits(utilization, clock.at))
        stored.append([(window.kind, window.utilization, window.seen_at - began) for window in q.store.windows()])
    first, later = [("five_hour", None, 0), ("overage", None, 0)], [("five_hour", None, 61), ("overage", None, 61)]
    assert stored == [first, first, first, later, [("five_hour", 0.9, 62), ("overage", None, 62)]]


def test_a_run_that_tells_no_limits_leaves_the_windows_alone(lines: Callable[..., Queue], clock: FakeClock) -> None:
    q = lines(clock)
    q.ask("one")
    q.run_all()
    q.claude.on_rate_limits(limits(seen_at=clock.at))
    before = q.store.windows()
    clock.advance(3600)
    q.claude.on_rate_limits(cab.RateLimitStatus())
    assert q.store.windows() == before != []
