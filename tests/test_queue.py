"""Tests of the queue: notifications reach their subscribers, and the worker runs jobs in order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab

# --- notifier ---


def test_a_notification_between_the_check_and_the_wait_is_not_lost() -> None:
    notifier = cab.Notifier()
    with notifier.subscribe("job") as waiter:
        waiter.clear()
        notifier.notify("job")
        assert waiter.wait(10)


def test_a_notification_reaches_all_subscribers_of_its_topic_and_no_others() -> None:
    notifier = cab.Notifier()
    with (
        notifier.subscribe("job") as first,
        notifier.subscribe("job") as second,
        notifier.subscribe("other") as other,
    ):
        notifier.notify("job")
        assert (first.wait(0), second.wait(0), other.wait(0)) == (True, True, False)
    # no subscriber: nothing happens
    notifier.notify("job")


def test_a_subscription_to_several_topics_is_notified_for_every_one() -> None:
    notifier = cab.Notifier()
    with (
        notifier.subscribe("job") as narrow,
        notifier.subscribe("job", cab.Notifier.text_topic("job")) as wide,
    ):
        notified = []
        for key in ("job", cab.Notifier.text_topic("job"), "other"):
            for waiter in (narrow, wide):
                waiter.clear()
            notifier.notify(key)
            notified.append((narrow.wait(0), wide.wait(0)))
    assert notified == [(True, True), (False, True), (False, False)]


def test_a_subscription_leaves_nothing_behind() -> None:
    notifier = cab.Notifier()
    with (
        pytest.raises(ZeroDivisionError),
        notifier.subscribe("job"),
        notifier.subscribe("job", "other"),
        notifier.subscribe("other", "third"),
    ):
        raise ZeroDivisionError
    assert notifier._waiters == {}


@pytest.mark.parametrize("keys", [("job",), ("job", "other")])
def test_closing_wakes_all_waiters_and_later_waits_return_at_once(keys: Sequence[str]) -> None:
    notifier = cab.Notifier()
    with notifier.subscribe(*keys) as before:
        notifier.close()
        assert before.wait(0) and notifier.is_closed
    with notifier.subscribe(*keys) as after:
        assert after.wait(0)


def test_threads_that_recheck_after_every_notification_see_the_last_state() -> None:
    notifier, state, seen = cab.Notifier(), [0], []

    def follow() -> None:
        with notifier.subscribe("job") as waiter:
            while True:
                waiter.clear()
                if state[0] == 500:
                    return seen.append(state[0])
                assert waiter.wait(10)

    threads = [threading.Thread(target=follow, name="follower") for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(1, 501):
        state[0] = number
        notifier.notify("job")
    for thread in threads:
        thread.join(10)
    assert seen == [500] * 8


# --- worker ---

Run = Callable[[cab.RunRequest, cab.LiveText, Callable[[], Optional[str]]], cab.Answer]


def echo(
    work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
) -> cab.Answer:
    return cab.Answer("Echo: %s" % work.message)


class Scripted:
    """A stand-in for ClaudeRunner and its pool.

    script: maps a message to its run; other messages are echoed.
    on_rate_limits: the callback of the current run.
    maintained, advanced, closed: how often the worker called these.
    conversation_exists, token_exists: the callbacks of the last eviction.
    """

    idle_count, is_busy = 0, False

    def __init__(self) -> None:
        self.pool = self.program = self
        self.install = cab.ClaudeInstall((), cab.Features.read("", ""), {}, "")
        self.script: Dict[str, Run] = {}
        self.seen: List[cab.RunRequest] = []
        self.on_rate_limits: Callable[[cab.RateLimitStatus], None] = lambda limits: None
        self.maintained = self.advanced = self.closed = 0
        self.conversation_exists: Optional[Callable[[str], bool]] = None
        self.token_exists: Optional[Callable[[str], bool]] = None

    def run(
        self,
        request: cab.RunRequest,
        live: cab.LiveText,
        stop_reason: Callable[[], Optional[str]],
        on_rate_limits: Callable[[cab.RateLimitStatus], None],
    ) -> cab.Answer:
        self.seen.append(request)
        self.on_rate_limits = on_rate_limits
        return self.script.get(str(request.message), echo)(request, live, stop_reason)

    def maintain(self) -> None:
        self.maintained += 1

    def advance(self) -> None:
        self.advanced += 1

    def evict_unless(
        self, conversation_exists: Callable[[str], bool], token_exists: Callable[[str], bool]
    ) -> None:
        self.conversation_exists, self.token_exists = conversation_exists, token_exists

    def session_ids(self) -> List[str]:
        return []

    def forget(self, key: str) -> None:
        """Do nothing: there are no processes."""

    def close(self) -> None:
        self.closed += 1


class Queue:
    """A worker over a real store, without processes and without HTTP."""

    def __init__(self, path: Path, clock: cab.Clock, log: List[str], **settings: Any) -> None:
        self.store = cab.Stores(path, clock)
        self.notifier = cab.Notifier()
        self.claude = Scripted()
        self.log = log
        self._clock, self._config = clock, cab.Config(**settings)
        self.worker = self.new_worker()
        self.token = self.store.tokens.add(cab.NewToken("app"), cab.new_token())

    def new_worker(self) -> cab.Worker:
        """Return a worker, as the next start of the bridge creates it."""
        runner: Any = self.claude
        return cab.Worker(self.store, runner, self.notifier, self._config, self._clock)

    def run_all(self) -> List[str]:
        """Step until there is nothing to do. -> the messages that ran."""
        before = len(self.claude.seen)
        while self.worker.step():
            assert len(self.claude.seen) < before + 20, "there is always something to do"
        return [str(work.message) for work in self.claude.seen[before:]]

    def ask(self, message: str, **fields: Any) -> str:
        job_id = self.store.jobs.enqueue(self.token.id, cab.Ask(message, **fields))[0].id
        self.notifier.notify(cab.Notifier.JOB_QUEUED)
        return job_id

    def job(self, job_id: str) -> cab.Job:
        job = self.store.jobs.get(job_id)
        assert job is not None
        return job

    def outcome(self, job_id: str) -> Tuple[str, Optional[str]]:
        """Return (status, the response or the error code) of a job, once it is finished."""
        job = wait_until(lambda: self.job(job_id).is_finished and self.job(job_id))
        return job.status, job.response if job.status == "completed" else job.error_code


@pytest.fixture
def new_queue(tmp_path: Path, log: List[str]) -> Iterator[Callable[..., Queue]]:
    """new_queue(clock, **settings) -> a Queue; at most one per test."""
    made: List[Queue] = []

    def make(clock: cab.Clock, **settings: Any) -> Queue:
        made.append(Queue(tmp_path / "bridge.db", clock, log, **settings))
        return made[-1]

    yield make
    for queue in made:
        queue.worker.close()
        queue.store.close()


@pytest.fixture
def queue(new_queue: Callable[..., Queue]) -> Queue:
    """Return a Queue with the real clock."""
    return new_queue(cab.Clock())


class Impatient(threading.Event):
    """The stop event of a worker that waits a twentieth of the requested time.

    After an error such a worker retries soon.
    """

    def wait(self, timeout: Optional[float] = None) -> bool:
        return super().wait(timeout and timeout / 20)


def failing(
    code: str, text: str, resets_at: Optional[float] = None, is_model_limit: bool = False
) -> Run:
    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        raise cab.RunFailed(code, text, resets_at, is_model_limit)

    return run


def refused(resets_at: Optional[float]) -> Run:
    """Return a run that the plan's limit refuses."""
    return failing("usage_limit", "You've hit your session limit", resets_at)


def saying(*texts: str, then: Run = echo) -> Run:
    """Return a run whose text arrives in these deltas."""

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        live.begin("model")
        for text in texts:
            live.add(text)
        return then(work, live, stop_reason)

    return run


def until_stopped(
    work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
) -> cab.Answer:
    reason = wait_until(stop_reason)
    raise cab.RunFailed(reason, cab.RUN_ERRORS[reason])


def test_jobs_run_in_order_and_a_step_without_one_does_nothing(queue: Queue) -> None:
    jobs = [queue.ask(message) for message in ("a", "b", "c")]
    assert [queue.worker.step() for _ in range(4)] == [True, True, True, False]
    assert [work.message for work in queue.claude.seen] == ["a", "b", "c"]
    assert [queue.outcome(job) for job in jobs] == [
        ("completed", "Echo: " + message) for message in ("a", "b", "c")
    ]


def test_a_run_receives_the_request_and_the_permissions_of_its_token(queue: Queue) -> None:
    queue.ask("plain")
    queue.ask(
        "full", model="haiku", system_prompt="Be brief.", json_schema='{"type":"object"}',
        effort="low",
    )
    queue.token = queue.store.tokens.add(
        cab.NewToken("tools", tools=("Read",)), cab.new_token(), "/srv/work"
    )
    queue.ask("tools")
    while queue.worker.step():
        pass
    assert [work.session for work in queue.claude.seen] == [
        cab.SessionConfig(cab.SYSTEM_PROMPT),
        cab.SessionConfig("Be brief.", "haiku", '{"type":"object"}', "low"),
        cab.SessionConfig(cab.SYSTEM_PROMPT, tools=("Read",), workspace="/srv/work"),
    ]
    assert {work.conversation for work in queue.claude.seen} == {None}


def test_a_conversation_is_continued_by_session_and_its_history_is_available(queue: Queue) -> None:
    queue.claude.script["one"] = lambda work, live, stop_reason: cab.Answer(
        "1", session_id="s1", spent_usd=0.5
    )
    for message in ("one", "two"):
        queue.ask(message, conversation="trip")
    queue.ask("else", conversation="other")
    queue.run_all()
    first, second, other = queue.claude.seen
    assert (first.session_id, first.spent_usd, first.history()) == (None, 0.0, [])
    assert (second.session_id, second.spent_usd, second.history()) == (
        "s1", 0.5, [cab.HistoryTurn("one", "1")],
    )
    assert first.conversation and first.conversation == second.conversation != other.conversation


@pytest.mark.parametrize(
    "code",
    [code for code in cab.RUN_ERRORS if code not in ("interrupted", "paused", *cab.HOLD_REASONS)],
)
def test_a_failed_run_is_stored_with_its_code_and_text(queue: Queue, code: str) -> None:
    queue.claude.script["bad"] = failing(code, "why it failed")
    job = queue.ask("bad")
    assert queue.worker.step()
    assert (queue.outcome(job), queue.job(job).error, queue.job(job).attempts) == (
        ("error", code), "why it failed", 1,
    )


def test_secrets_in_errors_of_the_cli_reach_neither_the_log_nor_the_caller(queue: Queue) -> None:
    secret = cab.new_token()
    queue.claude.script["bad"] = failing("cli_error", "key %s refused" % secret)
    job = queue.ask("bad")
    queue.worker.step()
    assert secret not in str(queue.job(job).error) + "".join(queue.log)
    assert "cab-" in str(queue.job(job).error)


def test_subscribers_are_notified_at_the_start_and_at_the_end_of_a_run(queue: Queue) -> None:
    job = queue.ask("hi")
    with queue.notifier.subscribe(job) as waiter:

        def run(
            work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
        ) -> cab.Answer:
            assert waiter.wait(0) and queue.job(job).status == "processing"
            waiter.clear()
            return cab.Answer("ok")

        queue.claude.script["hi"] = run
        queue.worker.step()
        assert waiter.wait(0) and queue.job(job).status == "completed"


def test_the_text_so_far_can_be_read_while_a_job_runs_and_not_after(queue: Queue) -> None:
    job, texts = queue.ask("hi"), []

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        for text in ("Hé", "llo"):
            live.add(text)
            running = queue.worker.live(job)
            texts.append(running and running.read())
        assert queue.worker.running and queue.worker.running[0] == job
        return cab.Answer("Héllo")

    queue.claude.script["hi"] = run
    queue.worker.step()
    assert texts == ["Hé", "Héllo"]
    assert queue.worker.live(job) is None
    assert queue.worker.running is None


@pytest.mark.parametrize(
    "deltas, answer, generation",
    [
        (("Hé", "llo"), "Héllo", 0),
        (("Hé",), "Héllo", 0),  # the stream was cut
        ((), "Héllo", 0),
        (("Bye",), "Héllo", 1),
        (("Hé", "llo"), "", 1),
        (("smile \ud83d", "\ude00."), "smile \U0001f600.", 0),
        (("half \ud83d",), "half \ud83d", 0),
    ],
)
def test_a_text_can_be_followed_from_the_run_into_the_stored_result(
    queue: Queue, deltas: Sequence[str], answer: str, generation: int
) -> None:
    # One reader follows the live text to its end; the other one reads the stored row at the end.
    running, stored = cab.TextCursor(0), cab.TextCursor(0)
    received: List[List[cab.JobEvent]] = [[], []]
    texts: List[cab.LiveText] = []

    def listen(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        texts.append(live)
        received[0] += live.events_since(running)
        received[1] += live.events_since(stored)
        return cab.Answer(answer)

    queue.claude.script["hi"] = saying(*deltas, then=listen)
    job = queue.ask("hi")
    with queue.notifier.subscribe(cab.Notifier.text_topic(job)) as waiter:
        queue.worker.step()
        assert waiter.wait(0)
    row = queue.job(job)
    received[0] += texts[0].events_since(running)
    received[1] += stored.begin(row.generation, row.model)
    received[1] += stored.read(lambda offset: (row.response or "")[offset:])
    for events in received:
        text = ""
        for event in events:
            text = "" if event.kind == "started" else text + event.text
            assert event.offset == len(text)
        assert text == row.response == cab.replace_surrogates(answer)
        assert [event.kind for event in events].count("started") == 1 + generation
    assert row.generation == texts[0].generation == generation


def test_the_worker_thread_runs_jobs_as_they_arrive(queue: Queue) -> None:
    queue.claude.script["who"] = lambda work, live, stop_reason: cab.Answer(
        threading.current_thread().name
    )
    queue.worker.start()
    wait_until(lambda: queue.claude.maintained)
    assert queue.outcome(queue.ask("who")) == ("completed", "worker")
    assert queue.outcome(queue.ask("again")) == ("completed", "Echo: again")


def test_after_a_run_the_next_process_is_made_ready_at_once(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    # Its clock stands still, so that the one-second maintenance is never due.
    queue = new_queue(clock)
    queue.worker.start()
    try:
        for n in (1, 2):
            wait_until(lambda: queue.claude.maintained == n)
            queue.outcome(queue.ask("hello"))
        wait_until(lambda: queue.claude.maintained == 3)
    finally:
        queue.worker.close()


def test_the_next_process_is_started_a_moment_after_a_run_began(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    counts = []

    def check(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        for seconds in (0.0, cab.REFILL_SECONDS / 2, cab.REFILL_SECONDS):
            clock.advance(seconds)
            assert stop_reason() is None
            counts.append(queue.claude.maintained)
        return cab.Answer("ok")

    queue.claude.script["long"] = check
    queue.ask("long")
    queue.worker.step()
    assert counts == [0, 0, 1]


def test_an_unexpected_error_is_retried_then_stored_and_the_worker_continues(queue: Queue) -> None:
    queue.claude.script["bug"] = lambda work, live, stop_reason: cab.Answer(str(1 / 0))
    queue.worker._stopping = Impatient()
    jobs = [queue.ask(message) for message in ("bug", "next")]
    queue.worker.start()
    assert [queue.outcome(job) for job in jobs] == [
        ("error", "interrupted"), ("completed", "Echo: next"),
    ]
    assert [work.message for work in queue.claude.seen] == ["bug", "bug", "next"]
    assert queue.job(jobs[0]).attempts == cab.JOB_ATTEMPTS
    assert queue.worker.is_alive and any("ZeroDivisionError" in text for text in queue.log)
    # This happens a moment after the answer is stored.
    wait_until(lambda: queue.worker.running is None)
    assert queue.worker.live(jobs[0]) is None


def test_a_job_is_not_lost_if_the_disk_is_full_at_its_end(queue: Queue) -> None:
    # Neither the answer nor, later, the recovery can be written: the worker must take the job up
    # again once writing works.
    queue.worker._stopping = Impatient()
    statements: List[str] = []

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        queue.claude.script.clear()
        queue.store.database._db.execute("PRAGMA query_only = ON")
        queue.store.database._db.set_trace_callback(statements.append)
        return cab.Answer("lost")

    queue.claude.script["hi"] = run
    job = queue.ask("hi")
    queue.worker.start()
    # The worker attempted the recovery, too.
    wait_until(lambda: list(statements).count("BEGIN IMMEDIATE") >= 2)
    queue.store.database._db.execute("PRAGMA query_only = OFF")
    queue.store.database._db.set_trace_callback(None)
    wait_until(lambda: queue.job(job).is_finished)
    assert queue.outcome(job) == ("completed", "lost")


def test_a_job_whose_token_is_revoked_is_stopped_and_the_next_one_runs(queue: Queue) -> None:
    queue.claude.script["long"] = until_stopped
    job = queue.ask("long")
    queue.worker.start()
    wait_until(lambda: queue.worker.running)
    queue.store.tokens.delete(queue.token.id)
    wait_until(lambda: not queue.worker.running)
    assert queue.store.jobs.get(job) is None and any("cancelled" in text for text in queue.log)
    queue.token = queue.store.tokens.add(cab.NewToken("other"), cab.new_token())
    assert queue.outcome(queue.ask("next")) == ("completed", "Echo: next")


def test_an_answer_that_came_too_late_is_not_announced_as_completed(queue: Queue) -> None:
    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        queue.store.tokens.delete(queue.token.id)
        return cab.Answer("late")

    queue.claude.script["hi"] = run
    queue.ask("hi")
    assert queue.worker.step() and not any("completed" in text for text in queue.log)


@pytest.mark.parametrize("deltas, generation", [((), 0), (("half",), 1)])
def test_closing_puts_a_running_job_back_without_counting_the_attempt(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, deltas: Sequence[str], generation: int
) -> None:
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.0)
    queue.claude.script["long"] = saying(*deltas, then=until_stopped)
    job, waits = queue.ask("long"), queue.ask("waits")
    queue.worker.start()
    wait_until(lambda: queue.worker.running)
    queue.worker.close()
    row = queue.job(job)
    assert (row.status, row.attempts, row.started_at) == ("queued", 0, None)
    assert queue.store.jobs.queue_positions(row) == (1, 1)
    # A reader that has some of the text learns that it restarts.
    assert row.generation == generation
    assert queue.job(waits).status == "queued"
    assert queue.claude.closed == 1
    assert not queue.worker.is_alive


def test_after_a_restart_a_job_continues_its_generation_count(queue: Queue) -> None:
    queue.claude.script["hi"] = saying("half", then=failing("interrupted", "end"))
    job, cursor, events = queue.ask("hi"), cab.TextCursor(4), []
    queue.worker.step()
    queue.worker = queue.new_worker()

    def listen(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        events.extend(live.events_since(cursor))
        return cab.Answer("Hello")

    queue.claude.script["hi"] = saying("Hel", then=listen)
    queue.worker.step()
    assert events == [cab.JobEvent("started", 0, model="model"), cab.JobEvent("delta", 3, "Hel")]
    assert (queue.outcome(job), queue.job(job).generation, queue.job(job).attempts) == (
        ("completed", "Hello"), 1, 1,
    )


def test_closing_lets_a_running_job_finish_and_starts_no_other(queue: Queue) -> None:
    is_closing = threading.Event()
    queue.claude.script["short"] = lambda work, live, stop_reason: cab.Answer(
        "done, %s" % is_closing.wait(10)
    )
    job, waits = queue.ask("short"), queue.ask("waits")
    queue.worker.start()
    wait_until(lambda: queue.worker.running)
    closer = threading.Thread(target=queue.worker.close, name="closer")
    closer.start()
    wait_until(queue.worker._stopping.is_set)
    is_closing.set()
    closer.join()
    assert queue.outcome(job) == ("completed", "done, True") and queue.job(waits).status == "queued"


def test_closing_twice_or_without_a_start_is_fine(queue: Queue) -> None:
    queue.worker.close()
    # Nothing was started, so nothing is closed.
    assert not queue.worker.is_alive and queue.claude.closed == 0
    queue.worker.close()


def test_closing_an_idle_worker_ends_its_processes_once(queue: Queue) -> None:
    queue.worker.start()
    wait_until(lambda: queue.claude.maintained)
    queue.worker.close()
    queue.worker.close()
    assert queue.claude.closed == 1


def test_an_idle_worker_deletes_old_jobs_and_evicts_deleted_conversations(
    queue: Queue, tmp_path: Path
) -> None:
    past = FakeClock(cab.Clock.now() - 8 * 86_400)
    earlier = cab.Stores(tmp_path / "bridge.db", past)
    old = earlier.jobs.enqueue(queue.token.id, cab.Ask("old")).job
    earlier.jobs.complete(earlier.jobs.claim() or old, cab.Answer("ok"))
    earlier.close()
    fresh, other = queue.ask("fresh", conversation="trip"), queue.ask("other", conversation="other")
    queue.worker.start()
    wait_until(lambda: queue.store.jobs.get(old.id) is None)
    exists = wait_until(lambda: queue.claude.conversation_exists)
    assert queue.outcome(fresh)[0] == queue.outcome(other)[0] == "completed"
    keys = [str(work.conversation) for work in queue.claude.seen]
    assert [exists(key) for key in (*keys, "trip", queue.token.id)] == [True, True, False, False]
    queue.store.conversations.delete(queue.token.id, "trip")
    assert [exists(key) for key in keys] == [False, True]


def test_a_conversation_with_the_name_of_a_deleted_one_is_a_new_one(queue: Queue) -> None:
    for message in ("one", "two"):
        queue.ask(message, conversation="trip")
        queue.run_all()
        queue.store.conversations.delete(queue.token.id, "trip")
    first, second = queue.claude.seen
    assert first.conversation != second.conversation and list(second.history()) == []


def test_maintenance_continues_during_a_run(
    new_queue: Callable[..., Queue], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "MAINTENANCE_SECONDS", 1.0)
    queue = new_queue(clock)
    counts = []

    def check(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        for _ in range(25):
            clock.advance(0.1)
            assert stop_reason() is None
        counts.append(
            (queue.claude.advanced, queue.claude.maintained, queue.claude.token_exists is not None)
        )
        return cab.Answer("ok")

    queue.claude.script["long"] = check
    queue.ask("long")
    queue.worker.step()
    # What was begun continues at every check, everything else is done once a second.
    assert counts == [(25, 3, True)]


def test_an_idle_worker_often_continues_what_its_pool_began(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "CANCEL_POLL_SECONDS", 0.01)
    monkeypatch.setattr(cab, "MAINTENANCE_SECONDS", 60.0)
    queue.claude.is_busy = True
    queue.worker.start()
    wait_until(lambda: queue.claude.advanced >= 30)  # otherwise once per round


def test_a_locked_database_does_not_end_a_run(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any) -> None:
        raise cab.Unavailable()

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        with monkeypatch.context() as patch:
            patch.setattr(queue.store.jobs, "status", locked)
            patch.setattr(queue.store.usage, "save_plan_limits", locked)
            queue.claude.on_rate_limits(limits())
            return cab.Answer(str(stop_reason()))

    queue.claude.script["hi"] = run
    job = queue.ask("hi")
    queue.worker.step()
    assert queue.outcome(job) == ("completed", "None") and queue.store.usage.plan_limits() == []
    # Limits that could not be written are written when the CLI reports them again.
    queue.claude.on_rate_limits(limits())
    assert len(queue.store.usage.plan_limits()) == 2


def test_a_job_cancelled_during_its_run_stays_cancelled(queue: Queue) -> None:
    queue.claude.script["long"] = until_stopped
    job = queue.ask("long")
    queue.worker.start()
    wait_until(lambda: queue.worker.running)
    queue.store.jobs.fail(queue.job(job), "cancelled", "Not wanted.")
    assert queue.outcome(queue.ask("next")) == ("completed", "Echo: next")
    assert (queue.outcome(job), queue.job(job).error) == (("error", "cancelled"), "Not wanted.")


# --- the plan's limits ---


class TwoClocks(FakeClock):
    """A clock that can be set without time passing, as by a person or a suspended computer."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 5.0

    def monotonic(self) -> float:
        return self.passed


def limits(
    utilization: Optional[float] = None, seen_at: float = 0.0, **fields: Any
) -> cab.RateLimitStatus:
    return cab.RateLimitStatus(
        windows=(
            cab.RateLimitWindow("five_hour", "allowed", utilization, 2e9, seen_at),
            cab.RateLimitWindow("overage", "rejected", None, None, seen_at),
        ),
        **fields,
    )


def test_a_refused_job_waits_at_the_head_until_the_limit_resets(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = saying("You've", then=refused(clock.at + 3600))
    jobs = [queue.ask(message) for message in ("one", "two", "three")]
    assert queue.run_all() == ["one"]
    assert queue.worker.current_pause() == cab.Pause("usage_limit", clock.at + 3600)
    row = queue.job(jobs[0])
    assert (row.status, row.attempts, row.started_at, row.error, row.generation) == (
        "queued", 0, None, None, 1,
    )
    assert queue.store.jobs.queue_positions(row) == (1, 1)
    clock.advance(3599)
    assert queue.run_all() == [] and [queue.job(job).status for job in jobs] == ["queued"] * 3
    queue.claude.script.clear()
    clock.advance(1)
    assert queue.worker.current_pause() is None and queue.run_all() == ["one", "two", "three"]
    assert [(queue.outcome(job), queue.job(job).attempts) for job in jobs] == [
        (("completed", "Echo: " + message), 1) for message in ("one", "two", "three")
    ]


def test_a_job_may_be_refused_any_number_of_times(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = refused(None)
    job = queue.ask("one")
    for _ in range(cab.JOB_ATTEMPTS + 2):
        assert queue.run_all() == ["one"]
        clock.advance(cab.DEFAULT_PAUSE_SECONDS)
    assert (queue.job(job).status, queue.job(job).attempts) == ("queued", 0)


@pytest.mark.parametrize(
    "resets_in, seconds",
    [
        (3600, 3600), (None, 900), (0, 5), (-60, 5), (-61, 900), (-86_400, 900),
        (8 * 86_400 + 1, 8 * 86_400), (1e9, 8 * 86_400),
    ],
)
def test_a_pause_has_a_minimum_and_a_maximum(
    new_queue: Callable[..., Queue], clock: FakeClock, resets_in: Optional[float], seconds: float
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = refused(None if resets_in is None else clock.at + resets_in)
    queue.ask("one")
    queue.run_all()
    assert queue.worker.current_pause() == cab.Pause("usage_limit", clock.at + seconds)
    assert any(str(cab.iso_time(clock.at + seconds)) in text for text in queue.log)


@pytest.mark.parametrize("which", ["at", "passed"])
def test_a_pause_ends_when_either_clock_reaches_its_deadline(
    new_queue: Callable[..., Queue], which: str
) -> None:
    clock = TwoClocks()
    queue = new_queue(clock)
    queue.claude.script["one"] = refused(clock.at + 3600)
    queue.ask("one")
    queue.run_all()
    for seconds, rests in ((3599, True), (1, False)):
        setattr(clock, which, getattr(clock, which) + seconds)
        assert bool(queue.worker.current_pause()) == rests and bool(queue.run_all()) != rests


@pytest.mark.parametrize("model", ["opus", None])
def test_the_limit_of_one_model_does_not_stop_the_others(
    new_queue: Callable[..., Queue], clock: FakeClock, model: Optional[str]
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = failing(
        "usage_limit", "You've hit your Opus limit", clock.at + 86_400, True
    )
    one, two = queue.ask("one", model=model), queue.ask("two", model=model)
    other = queue.ask("other", model="haiku")
    assert queue.run_all() == ["one", "other"] and queue.outcome(other)[0] == "completed"
    assert queue.worker.current_pause() is None
    assert queue.worker.current_pause("haiku") is None
    assert queue.worker.current_pause(model) == cab.Pause("usage_limit", clock.at + 86_400)
    assert [queue.job(job).status for job in (one, two)] == ["queued"] * 2 and queue.run_all() == []
    assert any((model or "default") in text for text in queue.log)
    queue.claude.script.clear()
    clock.advance(86_400)
    assert queue.run_all() == ["one", "two"]


def test_nothing_is_claimed_during_a_pause_and_work_resumes_after_it(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = refused(clock.at + 3600)
    one = queue.ask("one")
    queue.worker.start()
    wait_until(lambda: queue.worker.current_pause() and not queue.worker.running)
    two, rounds = queue.ask("two"), queue.claude.advanced

    def has_checked_again() -> bool:
        queue.notifier.notify(cab.Notifier.JOB_QUEUED)
        return queue.claude.advanced >= rounds + 2

    wait_until(has_checked_again)
    assert [queue.job(job).status for job in (one, two)] == ["queued", "queued"]
    assert len(queue.claude.seen) == 1
    queue.claude.script.clear()
    clock.advance(3600)
    assert [queue.outcome(job) for job in (one, two)] == [
        ("completed", "Echo: one"), ("completed", "Echo: two"),
    ]
    assert [work.message for work in queue.claude.seen] == ["one", "one", "two"]


def test_a_paused_worker_closes_at_once(new_queue: Callable[..., Queue], clock: FakeClock) -> None:
    queue = new_queue(clock)
    queue.claude.script["one"] = refused(None)
    job = queue.ask("one")
    queue.worker.start()
    wait_until(lambda: queue.worker.current_pause() and not queue.worker.running)
    queue.worker.close()
    assert not queue.worker.is_alive
    assert queue.claude.closed == 1
    assert queue.job(job).status == "queued"


def test_a_refused_job_that_was_cancelled_meanwhile_does_not_come_back(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        queue.store.jobs.fail(queue.job(job), "cancelled", "Not wanted.")
        return refused(None)(work, live, stop_reason)

    queue.claude.script["one"] = run
    job = queue.ask("one")
    queue.run_all()
    assert queue.outcome(job) == ("error", "cancelled") and queue.worker.current_pause()


@pytest.mark.parametrize("plan_only, ran", [(True, ["one"]), (False, ["one", "two"])])
def test_with_plan_only_paid_usage_starts_a_pause_after_that_answer(
    new_queue: Callable[..., Queue], clock: FakeClock, plan_only: bool, ran: List[str]
) -> None:
    queue = new_queue(clock, plan_only=plan_only)

    def run(
        work: cab.RunRequest, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]
    ) -> cab.Answer:
        queue.claude.on_rate_limits(limits(is_using_overage=True, resets_at=clock.at + 100))
        assert stop_reason() is None
        return cab.Answer("paid")

    queue.claude.script["one"] = run
    one, two = queue.ask("one"), queue.ask("two")
    assert queue.run_all() == ran and queue.outcome(one) == ("completed", "paid")
    pause = cab.Pause("usage_limit", clock.at + 100) if plan_only else None
    assert queue.worker.current_pause() == pause
    clock.advance(100)
    queue.run_all()
    assert queue.outcome(two) == ("completed", "Echo: two")


def test_with_plan_only_usage_within_the_plan_starts_no_pause(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock, plan_only=True)
    queue.ask("one")
    queue.run_all()
    queue.claude.on_rate_limits(limits(0.9, resets_at=clock.at + 100))
    assert queue.worker.current_pause() is None and len(queue.store.usage.plan_limits()) == 2


def test_the_plan_windows_are_stored_and_not_rewritten_for_every_run(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.ask("one")
    queue.run_all()
    began, stored = clock.at, []
    for seconds, utilization in ((0, None), (30, None), (60, None), (61, None), (62, 0.9)):
        clock.at = began + seconds
        queue.claude.on_rate_limits(limits(utilization, clock.at))
        stored.append(
            [
                (window.kind, window.utilization, window.seen_at - began)
                for window in queue.store.usage.plan_limits()
            ]
        )
    first = [("five_hour", None, 0), ("overage", None, 0)]
    later = [("five_hour", None, 61), ("overage", None, 61)]
    assert stored == [first, first, first, later, [("five_hour", 0.9, 62), ("overage", None, 62)]]


def test_a_run_that_reports_no_limits_keeps_the_stored_windows(
    new_queue: Callable[..., Queue], clock: FakeClock
) -> None:
    queue = new_queue(clock)
    queue.ask("one")
    queue.run_all()
    queue.claude.on_rate_limits(limits(seen_at=clock.at))
    before = queue.store.usage.plan_limits()
    clock.advance(3600)
    queue.claude.on_rate_limits(cab.RateLimitStatus())
    assert queue.store.usage.plan_limits() == before != []
