"""Tests of the service: the rules of the bridge, without HTTP, over a real store."""

from __future__ import annotations

import itertools
import json
import os
import random
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, cast

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab


class Running:
    """What the worker shows of its runs. texts: of the running jobs. pause: of the queue."""

    def __init__(self) -> None:
        self.texts: Dict[str, cab.LiveText] = {}
        self.pause: Optional[cab.Pause] = None

    def live(self, job_id: str) -> Optional[cab.LiveText]:
        return self.texts.get(job_id)

    def current_pause(self, model: Optional[str] = cab.ALL_MODELS) -> Optional[cab.Pause]:
        return self.pause


class Bench:
    """A service over a store, without a worker: the tests finish the jobs.

    clock: moved by hand; waits take real time.
    """

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self.clock, self.folder, self.notifier = clock, folder, cab.Notifier()
        self.store = cab.Stores(folder / "bridge.db", clock)
        self.running = Running()
        self.service = cab.Service(self.store, self.notifier, clock, folder, self.running)

    def caller(self, name: str = "app", **fields: Any) -> cab.Caller:
        token, secret = self.service.create_token(cab.NewToken(name, **fields))
        return self.service.authenticate(secret)

    def ask(self, caller: cab.Caller, message: str = "hi", **fields: Any) -> cab.Job:
        return self.service.ask(caller, cab.Ask(message, **fields)).job

    def waiter_count(self, job: cab.Job) -> int:
        """Return how many threads wait for the status or the text of a job."""
        topics = (job.id, cab.Notifier.text_topic(job.id))
        return sum(map(self.notifier.waiter_count, topics))

    def usage(self, caller: cab.Caller, days: Any = None) -> Dict[str, Any]:
        """Return the body of GET /api/usage."""
        query = {} if days is None else {"days": str(days)}
        request = cab.Request("GET", "/api/usage", query, {}, "127.0.0.1", lambda: b"")
        # The handler needs no more of the status.
        status = cast(Any, SimpleNamespace(latency=lambda owner: {"requests": 0}))
        context = cab.Context(self.service, status, caller, request, {})
        return dict(json.loads(cab.handle_usage(context).body))

    def run(self, answer: str = "ok") -> cab.Job:
        """Do the worker's part for the oldest job."""
        job = self.store.jobs.claim()
        assert job is not None
        self.store.jobs.complete(job, cab.Answer(answer))
        self.notifier.notify(job.id)
        return job

    def begin(self) -> Tuple[cab.Job, cab.LiveText]:
        """Claim the oldest job. -> the job, and its live text, which notifies the subscribers."""
        job = self.store.jobs.claim()
        assert job is not None
        live = cab.LiveText(
            job.generation, lambda: self.notifier.notify(cab.Notifier.text_topic(job.id))
        )
        self.running.texts[job.id] = live
        self.notifier.notify(job.id)
        live.begin("model-1")
        return job, live

    def end(self, job: cab.Job, text: str) -> None:
        """Complete the job with the text that was streamed, as the worker does."""
        live = self.running.texts[job.id]
        live.reconcile(text)
        self.store.jobs.complete(job, cab.Answer(text, model="model-1"), live.generation)
        del self.running.texts[job.id]
        self.notifier.notify(job.id)


class Time(FakeClock):
    """A clock whose date is moved by hand; monotonic time is real, because waits depend on it."""

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    instance = Bench(tmp_path, Time())
    yield instance
    instance.notifier.close()
    instance.store.close()


def in_thread(task: Callable[[], Any]) -> Callable[[], Any]:
    """Start a task in a thread. -> a function that waits for its result, at most 10 s.

    A BridgeError that the task raises is its result.
    """
    results: List[Any] = []

    def run() -> None:
        try:
            results.append(task())
        except cab.BridgeError as error:
            results.append(error)

    thread = threading.Thread(target=run, name="task")
    thread.start()

    def result() -> Any:
        thread.join(10)
        return results[0]

    return result


# --- authentication ---


def test_a_token_identifies_its_caller_and_its_use_is_recorded(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app", admin=True))
    bench.clock.advance(5)
    caller = bench.service.authenticate(secret)
    assert (caller.id, caller.is_admin) == (token.id, True)
    # The use is recorded in the background; this write comes after it.
    bench.store.database.check_writable()
    assert (bench.store.tokens.get(token.id) or token).last_used_at == bench.clock.now()


def test_an_unknown_token_is_refused(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app"))
    for wrong in (
        "", secret[:-1], secret.upper(), secret + " ", token.prefix, cab.digest(secret), token.id,
        cab.new_token(), "é\0' OR 1=1 --",
    ):
        with pytest.raises(cab.InvalidToken):
            bench.service.authenticate(wrong)


def test_expired_and_revoked_tokens_are_refused_and_their_use_is_not_recorded(bench: Bench) -> None:
    brief, brief_secret = bench.service.create_token(cab.NewToken("brief", expires_in_days=1))
    gone, gone_secret = bench.service.create_token(cab.NewToken("gone"))
    bench.clock.advance(86_400)
    bench.service.revoke_token(gone.id)
    for secret in (brief_secret, gone_secret):
        with pytest.raises(cab.InvalidToken):
            bench.service.authenticate(secret)
    assert [(token.id, token.last_used_at) for token in bench.store.tokens.list()] == [
        (brief.id, None)
    ]


# --- ask and poll ---


def test_an_ask_is_in_the_store_on_return_and_wakes_the_worker(bench: Bench) -> None:
    caller = bench.caller()
    with bench.notifier.subscribe(cab.Notifier.JOB_QUEUED) as waiter:
        job, position, is_new = bench.service.ask(caller, cab.Ask("hi", model="haiku"))
        assert waiter.wait(0)
    stored = bench.store.jobs.get(job.id)
    assert (position, is_new) == (1, True)
    assert stored
    assert (stored.message, stored.model, stored.conversation) == ("hi", "haiku", None)


@pytest.mark.parametrize(
    "mode, requested, stored",
    [("stateless", None, None), ("stateful", None, "default"), ("stateful", "trip", "trip")],
)
def test_only_a_stateful_token_has_conversations(
    bench: Bench, mode: str, requested: Optional[str], stored: Optional[str]
) -> None:
    job = bench.ask(bench.caller(session_mode=mode), conversation=requested)
    assert (bench.store.jobs.get(job.id) or job).conversation == stored


def test_a_conversation_with_a_stateless_token_is_refused_and_nothing_is_queued(
    bench: Bench,
) -> None:
    caller = bench.caller()
    with pytest.raises(cab.InvalidRequest) as refused:
        bench.ask(caller, conversation="trip")
    assert refused.value.extra == {"field": "conversation"} and "stateful" in str(refused.value)
    assert bench.store.jobs.counts() == {}


def test_a_job_is_shown_to_its_owner_and_to_admins_and_unknown_to_all_others(bench: Bench) -> None:
    owner, admin, other = bench.caller(), bench.caller(admin=True), bench.caller()
    job = bench.ask(owner)
    for caller in (owner, admin):
        assert bench.service.poll(caller, job.id).job.id == job.id
    refusals = []
    for caller, job_id in (
        (other, job.id), (other, "no-such-id"), (owner, "no-such-id"), (admin, ""),
        (owner, job.id.upper()),
    ):
        with pytest.raises(cab.NotFound) as refused:
            bench.service.poll(caller, job_id, wait=30)
        refusals.append(cab.error_body(refused.value))
    # A caller cannot find out which ids exist.
    assert refusals == [{"error": "Request not found", "code": "not_found"}] * 5


def test_a_poll_follows_a_job_from_the_queue_to_its_answer(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller, "first"), bench.ask(caller, "second")
    assert [bench.service.poll(caller, job.id).queue_position for job in (first, second)] == [1, 2]
    running, live = bench.begin()
    assert running.id == first.id
    live.add("so f")
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.queue_position, view.overall_position, view.partial) == (
        "processing", 0, 1, "so f",
    )
    view = bench.service.poll(caller, second.id)
    assert (view.job.status, view.queue_position, view.overall_position, view.partial) == (
        "queued", 1, 2, None,
    )
    bench.end(running, "so far, so good")
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.job.response, view.queue_position, view.partial) == (
        "completed", "so far, so good", 0, None,
    )


def test_a_poll_reports_the_pause_that_a_job_waits_for(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller), bench.ask(caller)

    def pauses() -> List[Optional[cab.Pause]]:
        return [bench.service.poll(caller, job.id).pause for job in (first, second)]

    limit = bench.running.pause = cab.Pause("usage_limit", bench.clock.now() + 60)
    assert pauses() == [limit, limit]
    _, live = bench.begin()
    bench.running.pause = None
    overload = cab.Pause("overloaded", bench.clock.now() + 2)
    live.restart()
    live.current_pause = overload
    assert pauses() == [overload, None]
    live.begin("model-1")
    assert bench.service.poll(caller, first.id).pause is None


def test_the_text_of_a_requeued_run_is_not_returned(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    running, live = bench.begin()
    live.add("hardly begun")
    live.restart()
    live.current_pause = cab.Pause("overloaded", bench.clock.now() + 2)
    bench.store.jobs.requeue(running)  # the text is dropped later
    view = bench.service.poll(caller, job.id)
    assert (view.job.status, view.partial, view.pause) == ("queued", None, None)
    assert [
        event.kind for event, _ in itertools.islice(bench.service.follow(caller, job.id), 1)
    ] == ["queued"]


def test_a_poll_of_a_finished_job_never_waits(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    bench.run()
    began = time.monotonic()
    assert bench.service.poll(caller, job.id, wait=30).job.is_finished
    assert time.monotonic() - began < 5


def test_a_waiting_poll_returns_at_once_when_the_job_is_finished(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.waiter_count(job))
    bench.run("here")
    assert result().job.response == "here" and time.monotonic() - began < 5


def test_a_waiting_poll_ignores_notifications_before_the_job_is_finished(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.waiter_count(job))
    running = bench.store.jobs.claim()
    for _ in range(50):
        bench.notifier.notify(job.id)
    bench.store.jobs.fail(running or job, "timeout", "x")
    bench.notifier.notify(job.id)
    assert result().job.error_code == "timeout"


def test_a_poll_waits_no_longer_than_requested(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    assert bench.service.poll(caller, job.id, wait=0.1).job.status == "queued"
    assert 0.1 <= time.monotonic() - began < 5
    assert bench.waiter_count(job) == 0


def test_closing_ends_every_wait_with_the_present_state(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.waiter_count(job))
    bench.notifier.close()
    assert result().job.status == "queued"


def test_a_wait_ends_when_the_token_is_revoked(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.waiter_count(job))
    bench.service.revoke_token(caller.id)
    assert isinstance(result(), cab.InvalidToken)


def test_a_token_revoked_between_two_checks_of_a_wait_is_an_invalid_token(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, check = bench.caller(), bench.service.check_token
    job = bench.ask(caller)

    # Its jobs are deleted with the token, so that the next look-up finds none.
    def revoke_after_check(owner: cab.Caller) -> None:
        check(owner)
        bench.service.revoke_token(owner.id)

    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.01)
    monkeypatch.setattr(bench.service, "check_token", revoke_after_check)
    with pytest.raises(cab.InvalidToken):
        bench.service.poll(caller, job.id, wait=30)


def test_revoking_a_token_notifies_the_subscribers_of_its_unfinished_jobs(bench: Bench) -> None:
    caller = bench.caller()
    jobs = [bench.ask(caller) for _ in range(2)]
    bench.store.jobs.claim()
    with (
        bench.notifier.subscribe(jobs[0].id) as running,
        bench.notifier.subscribe(jobs[1].id) as waiting,
    ):
        bench.service.revoke_token(caller.id)
        assert running.wait(0) and waiting.wait(0)


def test_a_job_counts_as_own_and_unfinished_only_for_its_owner(bench: Bench) -> None:
    owner, admin = bench.caller(), bench.caller(admin=True)
    done, waits = bench.ask(owner), bench.ask(owner)
    bench.run()
    assert [
        bench.service.is_own_unfinished(owner, job_id) for job_id in (done.id, waits.id, "none")
    ] == [False, True, False]
    assert not bench.service.is_own_unfinished(admin, waits.id)


# --- settings of a token ---


@pytest.mark.parametrize(
    "models, requested, stored",
    [
        (None, None, None), (None, "opus", "opus"), (("haiku", "opus"), None, "haiku"),
        (("haiku", "opus"), "opus", "opus"), (("default", "haiku"), None, None),
    ],
)
def test_the_first_of_a_token_s_models_is_its_default(
    bench: Bench, models: Any, requested: Optional[str], stored: Optional[str]
) -> None:
    job = bench.ask(bench.caller(models=models), model=requested)
    assert (bench.store.jobs.get(job.id) or job).model == stored


def test_another_model_is_refused_with_the_allowed_ones_and_nothing_is_queued(bench: Bench) -> None:
    caller = bench.caller(models=("haiku", "opus"))
    with pytest.raises(cab.ModelNotAllowed, match="sonnet.*haiku, opus") as refused:
        bench.ask(caller, model="sonnet")
    assert refused.value.extra == {"field": "model"} and bench.store.jobs.counts() == {}


def test_the_same_idempotency_key_returns_the_same_job(bench: Bench) -> None:
    caller, other = bench.caller(), bench.caller()
    first = bench.service.ask(caller, cab.Ask("hi"), "key")
    # `wait` and `stream` do not make it another request.
    again = bench.service.ask(caller, cab.Ask("hi", wait=5, stream=True), "key")
    assert (again.job, again.position, again.is_new) == (first.job, 1, False)
    assert bench.service.ask(other, cab.Ask("hi"), "key").job.id != first.job.id
    for differs in (
        cab.Ask("ho"), cab.Ask("hi", model="haiku"), cab.Ask("hi", system_prompt="x"),
        cab.Ask("hi", effort="low"),
    ):
        with pytest.raises(cab.IdempotencyConflict):
            bench.service.ask(caller, differs, "key")
    bench.run()
    assert bench.service.ask(caller, cab.Ask("hi"), "key")[1:] == (0, False)
    assert bench.store.jobs.counts() == {"completed": 1, "queued": 1}


def test_a_full_queue_reports_when_the_plan_resets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise cab.retry_later(cab.QueueFull, "", 10)

    caller = bench.caller()
    monkeypatch.setattr(cab.JobStore, "enqueue", refuse)
    for pause, text, seconds in (
        (None, "Queue is full. Please try again later.", 10),
        (cab.Pause("usage_limit", bench.clock.now() + 90.5), "2027-01-15T08:01:30.500Z", 91),
    ):
        bench.running.pause = pause
        with pytest.raises(cab.QueueFull) as full:
            bench.ask(caller)
        assert text in str(full.value)
        if pause is None:
            assert str(full.value) == text
        assert full.value.headers == (("Retry-After", str(seconds)),)
        assert full.value.extra == {"retryAfter": seconds}


# --- follow ---


class Reader:
    """A thread that follows a job until the stream ends or `left` is set.

    received: (kind, offset, text) of every step.
    """

    def __init__(
        self, bench: Bench, caller: cab.Caller, job_id: str, after: int = 0, position: int = 0
    ) -> None:
        self.received: List[Tuple[str, int, str]] = []
        self.views: List[Optional[cab.JobView]] = []
        self.left = threading.Event()
        self._events = bench.service.follow(caller, job_id, after, position, self.left.is_set)
        self._end = in_thread(self._read)

    def _read(self) -> None:
        for event, view in self._events:
            self.views.append(view)
            self.received.append((event.kind, event.offset, event.text))

    def wait_for(self, *expected: Tuple[str, int, str]) -> None:
        """Wait until exactly these steps were received."""
        wait_until(lambda: self.received == list(expected) or len(self.received) > len(expected))
        assert self.received == list(expected)

    def end(self) -> Any:
        """Wait for the end. -> the error that ended it, or None."""
        return self._end()


def test_a_reader_receives_every_step_as_it_happens(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    reader = Reader(bench, caller, job.id)
    expected: List[Tuple[str, int, str]] = [("queued", 0, "")]
    reader.wait_for(*expected)
    running, live = bench.begin()
    expected.append(("started", 0, ""))
    reader.wait_for(*expected)
    for text, offset in (("one ", 4), ("two", 7)):
        live.add(text)
        expected.append(("delta", offset, text))
        reader.wait_for(*expected)
    bench.end(running, "one two!")
    assert reader.end() is None
    assert reader.received == [*expected, ("delta", 8, "!"), ("completed", 8, "")]
    assert reader.views[-1]
    assert reader.views[-1].job.response == "one two!"
    assert reader.views[0]
    assert reader.views[0].overall_position == 1
    assert bench.waiter_count(job) == 0


def test_a_position_that_the_caller_knows_is_not_sent_again(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller), bench.ask(caller)
    reader = Reader(bench, caller, second.id, position=2)
    wait_until(lambda: bench.waiter_count(second))
    bench.service.cancel(caller, first.id)
    bench.notifier.notify(second.id)
    reader.wait_for(("queued", 0, ""))
    assert reader.views[0] and reader.views[0].overall_position == 1
    reader.left.set()
    bench.notifier.notify(second.id)
    assert reader.end() is None


def test_a_requeued_job_restarts_for_its_readers(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    running, live = bench.begin()
    live.add("half an ans")
    reader = Reader(bench, caller, job.id)
    reader.wait_for(("started", 0, ""), ("delta", 11, "half an ans"))
    bench.running.pause = cab.Pause("usage_limit", bench.clock.now() + 60)
    live.restart()
    bench.store.jobs.requeue(running, live.generation)
    del bench.running.texts[job.id]
    bench.notifier.notify(job.id)
    expected = [("started", 0, ""), ("delta", 11, "half an ans"), ("queued", 0, "")]
    reader.wait_for(*expected)
    assert reader.views[-1] and reader.views[-1].pause == bench.running.pause
    again, live = bench.begin()
    assert live.generation == 1
    bench.end(again, "whole")
    assert reader.end() is None
    assert reader.received == [
        *expected, ("started", 0, ""), ("delta", 5, "whole"), ("completed", 5, ""),
    ]


def test_following_a_missing_or_foreign_job_is_refused_at_once(bench: Bench) -> None:
    owner, other = bench.caller(), bench.caller()
    job = bench.ask(owner)
    for caller, job_id in ((other, job.id), (owner, "none"), (owner, "")):
        with pytest.raises(cab.NotFound):
            # The error is raised here, not when the first event is read.
            bench.service.follow(caller, job_id)


def test_a_stream_ends_when_its_token_is_revoked_or_expires(bench: Bench) -> None:
    caller, brief = bench.caller(), bench.caller(admin=True, expires_in_days=1)
    job = bench.ask(caller)
    readers = [Reader(bench, client, job.id) for client in (brief, caller)]
    for reader in readers:
        reader.wait_for(("queued", 0, ""))
    bench.clock.advance(86_400)
    bench.notifier.notify(job.id)
    assert isinstance(readers[0].end(), cab.InvalidToken)
    bench.service.revoke_token(caller.id)
    # The job is deleted with its token, perhaps during a look-up.
    assert isinstance(readers[1].end(), (cab.InvalidToken, cab.NotFound))
    assert bench.waiter_count(job) == 0


def test_closing_ends_every_stream(bench: Bench) -> None:
    caller = bench.caller()
    readers = [Reader(bench, caller, bench.ask(caller).id) for _ in range(3)]
    for reader in readers:
        reader.wait_for(("queued", 0, ""))
    bench.notifier.close()
    assert [reader.end() for reader in readers] == [None] * 3
    assert [len(reader.received) for reader in readers] == [1] * 3


# --- cancel, lists, conversations, usage ---


def test_a_job_that_waits_or_runs_is_cancelled_once(bench: Bench) -> None:
    owner, other, admin = bench.caller(), bench.caller(), bench.caller(admin=True)
    running, waiting, done = (bench.ask(owner) for _ in range(3))
    bench.store.jobs.claim()
    for job, caller in ((running, owner), (waiting, admin)):
        with pytest.raises(cab.NotFound):
            bench.service.cancel(other, job.id)
        with bench.notifier.subscribe(job.id) as waiter:
            view = bench.service.cancel(caller, job.id)
            assert waiter.wait(0)
        assert (view.job.status, view.job.error_code, view.job.completed_at) == (
            "error", "cancelled", bench.clock.now(),
        )
        with pytest.raises(cab.AlreadyFinished):
            bench.service.cancel(caller, job.id)
    assert not bench.store.jobs.complete(running, cab.Answer("too late"))
    bench.run()
    with pytest.raises(cab.AlreadyFinished):
        bench.service.cancel(owner, done.id)
    assert bench.store.jobs.counts() == {"error": 2, "completed": 1}


def test_a_list_holds_the_jobs_of_the_caller_and_for_an_admin_all(bench: Bench) -> None:
    one, two, admin = bench.caller(), bench.caller(), bench.caller(admin=True)
    jobs = [bench.ask(caller).id for caller in (one, two, one, admin, one)]
    bench.run()
    bench.store.jobs.claim()

    def listed(
        caller: cab.Caller, statuses: Tuple[str, ...] = (), *page: Any
    ) -> Tuple[List[int], Optional[int]]:
        result = bench.service.jobs(caller, cab.JobFilter(None, statuses), *page)
        return [jobs.index(view.job.id) for view in result.views], result.next

    assert [listed(caller)[0] for caller in (one, two, admin)] == [[4, 2, 0], [1], [4, 3, 2, 1, 0]]
    assert listed(admin, ("queued",)) == ([4, 3, 2], None)
    assert listed(admin, ("processing", "completed"))[0] == [1, 0]
    page, following = listed(admin, (), None, 2)
    assert page == [4, 3] and listed(admin, (), following, 2)[0] == [2, 1]
    views = bench.service.jobs(admin).views
    assert [(view.queue_position, view.overall_position) for view in views] == [
        (3, 4), (2, 3), (1, 2), (0, 1), (0, 0),
    ]


def test_conversations_belong_to_their_token_and_a_deleted_one_restarts_empty(bench: Bench) -> None:
    caller, other = bench.caller(session_mode="stateful"), bench.caller(session_mode="stateful")
    for name, message in (("a", "first"), ("b", "second"), ("a", "third")):
        bench.clock.advance(1)
        bench.ask(caller, message, conversation=name)
        bench.run()
    assert [(row.name, row.turns) for row in bench.store.conversations.list(caller.id)] == [
        ("a", 2), ("b", 1),
    ]
    assert bench.store.conversations.list(other.id) == []
    for client, name in ((other, "a"), (caller, "c"), (caller, "\ud800")):
        with pytest.raises(cab.NotFound, match="Conversation not found"):
            bench.service.delete_conversation(client, name)
    bench.service.delete_conversation(caller, "a")
    assert [row.name for row in bench.store.conversations.list(caller.id)] == ["b"]
    job = bench.ask(caller, "fourth", conversation="a")
    assert bench.store.conversations.history(job) == []
    assert len(bench.service.jobs(caller).views) == 4


def test_usage_is_summed_by_day_and_token_and_shows_the_plan(bench: Bench) -> None:
    caller, admin = bench.caller("app"), bench.caller("boss", admin=True)
    bench.ask(caller)
    bench.run()
    bench.clock.advance(86_400)
    bench.ask(admin)
    bench.store.usage.save_plan_limits(
        [cab.RateLimitWindow("five_hour", "allowed", 0.5, None, bench.clock.now())]
    )
    pause = bench.running.pause = cab.Pause("usage_limit", bench.clock.now() + 60)
    for asker, days, names in (
        (caller, 30, ["app"]), (caller, 1, []), (admin, 2, ["app", "boss"]), (admin, 1, ["boss"]),
    ):
        body = bench.usage(asker, days)
        assert sorted(row["name"] for row in body["tokens"]) == names
        assert len(body["days"]) == body["total"]["requests"] == len(names)
        assert body["since"] == cab.day_of(bench.clock.now() - (days - 1) * 86_400)
        assert [window["type"] for window in body["plan"]["windows"]] == ["five_hour"]
        assert body["plan"]["waitingFor"] == pause.reason
        assert body["plan"]["resumesAt"] == cab.iso_time(pause.until)


def test_the_sums_of_usage_equal_the_rows_of_many_days_and_tokens(bench: Bench) -> None:
    admin = bench.caller("boss", admin=True)
    apps = [bench.caller("app %d" % number) for number in range(30)]
    rng, today = random.Random(0), bench.clock.now()
    rows: List[cab.DayUsage] = []
    for ago in range(60):
        for caller in rng.sample(apps, 20):
            counts = [rng.randrange(1_000) for _ in range(3)]
            # Fractions of a binary number: their sums are exact in any order.
            usage = cab.Usage(*(rng.randrange(10**9) for _ in range(4)), rng.randrange(999) / 64)
            day = cab.day_of(today - ago * 86_400)
            rows.append(cab.DayUsage(day, caller.id, *counts, usage))

    def insert(db: sqlite3.Connection) -> None:
        db.executemany(
            "INSERT INTO usage VALUES (%s)" % cab.placeholders(range(10)),
            [(*row[:5], *row.usage) for row in rows],
        )

    def sums(selected: List[cab.DayUsage]) -> Dict[str, Any]:
        """Return the sums of rows in the names of the API."""
        columns = list(zip(*((*row[2:5], *row.usage) for row in selected)))
        names = (
            "requests", "completed", "errors", "inputTokens", "outputTokens", "cacheReadTokens",
            "cacheCreationTokens", "costUsd",
        )
        return {name: sum(column) for name, column in zip(names, columns)}

    bench.store.database.write(insert)
    gone = apps.pop()
    bench.service.revoke_token(gone.id)
    for caller, days in ((admin, 400), (admin, 60), (admin, 7), (apps[0], 60), (apps[0], 7)):
        since = cab.day_of(today - (days - 1) * 86_400)
        selected = [
            row
            for row in rows
            if row.day >= since and (caller is admin or row.token_id == caller.id)
        ]
        body = bench.usage(caller, days)
        assert body["total"] == sums(selected)
        assert body["days"] == [
            {"day": day, **sums([row for row in selected if row.day == day])}
            for day in sorted({row.day for row in selected})
        ]
        names = {app.id: app.name for app in apps}
        assert body["tokens"] == [
            {
                "tokenId": token_id, "name": names.get(token_id),
                **sums([row for row in selected if row.token_id == token_id]),
            }
            for token_id in [row["tokenId"] for row in body["tokens"]]
        ]
        assert {row["tokenId"] for row in body["tokens"]} == {row.token_id for row in selected}
        costs = [row["costUsd"] for row in body["tokens"]]
        assert costs == sorted(costs, reverse=True)
    assert None in [row["name"] for row in bench.usage(admin, 60)["tokens"]]


# --- tokens ---


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("tools", ["read", "web", "all", ("Read", "Bash(ls)")], ids=str)
def test_a_token_with_tools_has_a_workspace_of_its_own_closed_to_others(
    bench: Bench, tools: Any
) -> None:
    tokens = [bench.service.create_token(cab.NewToken("t", tools=tools))[0] for _ in range(2)]
    folders = [Path(str(token.workspace)) for token in tokens]
    assert folders[0] != folders[1]
    assert all(folder.is_dir() and not any(folder.iterdir()) for folder in folders)
    assert {
        path.stat().st_mode & 0o777 for folder in folders for path in (folder, folder.parent)
    } == {0o700}
    assert bench.folder in folders[0].parents and bench.store.tokens.get(tokens[0].id) == tokens[0]


def test_a_token_without_tools_has_none(bench: Bench) -> None:
    assert bench.service.create_token(cab.NewToken("t"))[0].workspace is None
    assert not (bench.folder / "workspaces").exists()


def test_a_workspace_that_exists_is_used_as_it_is(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    token, _ = bench.service.create_token(cab.NewToken("t", tools="read"), tmp_path / "mine")
    assert token.workspace == str(tmp_path / "mine") and not (tmp_path / "workspaces").exists()
    assert os.name != "posix" or (tmp_path / "mine").stat().st_mode & 0o777 == 0o755


def test_a_token_that_is_refused_leaves_no_workspace_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab, "TOKENS", 1)
    bench.service.create_token(cab.NewToken("t", tools="read"))
    with pytest.raises(cab.TokenLimit):
        bench.service.create_token(cab.NewToken("t", tools="read"))
    assert len(list((bench.folder / "workspaces").iterdir())) == 1


def test_a_secret_is_returned_once_and_matches_its_token(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app", 30, session_mode="stateful"))
    assert secret.startswith(token.prefix)
    assert len(token.prefix) == 12
    assert bench.service.authenticate(secret).id == token.id
    assert secret not in repr(bench.store.tokens.list())


def test_revoking_a_missing_token_is_not_found_and_the_last_admin_stays(bench: Bench) -> None:
    admin = bench.caller(admin=True)
    with pytest.raises(cab.LastAdmin):
        bench.service.revoke_token(admin.id)
    app = bench.caller()
    bench.service.revoke_token(app.id)
    for token_id in (app.id, "none", ""):
        with pytest.raises(cab.NotFound) as refused:
            bench.service.revoke_token(token_id)
        assert str(refused.value) == "Token not found"
    assert bench.store.tokens.has_admin()
    assert [token.id for token in bench.store.tokens.list()] == [admin.id]


def test_a_database_that_cannot_be_written_is_reported(bench: Bench) -> None:
    bench.store.database.check_writable()
    bench.store.database._db.execute("PRAGMA query_only = ON")
    with pytest.raises(cab.Unavailable):
        bench.store.database.check_writable()


# --- the list of models ---


class FakeCli:
    """Replaces `ask_models`: counts the calls, and answers with `models` once `gate` is set.

    installs: of each call. models: () stands for a CLI that returns no list.
    """

    def __init__(self) -> None:
        self.installs: List[cab.ClaudeInstall] = []
        self.models: Tuple[cab.Model, ...] = (cab.Model("opus", "Opus"),)
        self.gate = threading.Event()
        self.gate.set()

    def ask(self, install: cab.ClaudeInstall, data_dir: Path) -> Tuple[cab.Model, ...]:
        self.installs.append(install)
        assert self.gate.wait(10)
        return self.models


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCli]:
    instance = FakeCli()
    monkeypatch.setattr(cab, "ask_models", instance.ask)
    yield instance
    instance.gate.set()


def new_install(account: str = "somebody") -> cab.ClaudeInstall:
    features = cab.Features((2, 1, 330), "2.1.330", frozenset())
    return cab.ClaudeInstall(("never-run",), features, {}, account)


@pytest.fixture
def claude_program() -> cab.ClaudeProgram:
    return cab.ClaudeProgram(new_install())


@pytest.fixture
def catalog(
    cli: FakeCli, claude_program: cab.ClaudeProgram, tmp_path: Path, clock: FakeClock
) -> cab.ModelCatalog:
    return cab.ModelCatalog(claude_program, tmp_path, clock)


NEW_MODELS = (cab.Model("opus", "Opus"), cab.Model("haiku", "Haiku"))


def test_callers_share_one_look_up_of_the_models(cli: FakeCli, catalog: cab.ModelCatalog) -> None:
    cli.gate.clear()
    results = [in_thread(catalog.list) for _ in range(8)]
    wait_until(lambda: cli.installs)
    # Give the others time to ask as well, if they did not wait for the first one.
    time.sleep(0.05)
    assert len(cli.installs) == 1
    cli.gate.set()
    assert [result() for result in results] == [cli.models] * 8
    assert catalog.list() == cli.models and len(cli.installs) == 1


def test_callers_share_the_failure_of_a_look_up_and_the_next_one_asks_again(
    cli: FakeCli, catalog: cab.ModelCatalog
) -> None:
    models, cli.models = cli.models, ()
    cli.gate.clear()
    entered: List[None] = []

    def ask() -> Tuple[cab.Model, ...]:
        entered.append(None)
        return catalog.list()

    results = [in_thread(ask) for _ in range(4)]
    wait_until(lambda: cli.installs and len(entered) == 4)
    # A caller that comes after the end of the look-up would ask again.
    time.sleep(0.1)
    cli.gate.set()
    errors = [result() for result in results]
    assert {type(error) for error in errors} == {cab.Unavailable} and len(cli.installs) == 1
    # The answer adds headers to its error, so no two callers may share the object.
    assert len({id(error) for error in errors}) == 4
    cli.models = models
    assert catalog.list() == models and len(cli.installs) == 2


def test_an_expired_list_of_models_is_refreshed(
    cli: FakeCli, catalog: cab.ModelCatalog, clock: FakeClock
) -> None:
    old = catalog.list()
    cli.models = NEW_MODELS
    clock.advance(cab.MODELS_SECONDS - 1)
    assert catalog.list() == old and len(cli.installs) == 1
    clock.advance(1)
    assert catalog.list() == NEW_MODELS and len(cli.installs) == 2
    clock.advance(cab.MODELS_SECONDS - 1)
    assert catalog.list() == NEW_MODELS and len(cli.installs) == 2


def test_the_list_of_models_is_refreshed_after_an_update(
    cli: FakeCli, catalog: cab.ModelCatalog, claude_program: cab.ClaudeProgram
) -> None:
    first = claude_program.install
    catalog.list()
    claude_program.install = new_install("somebody else")
    cli.models = NEW_MODELS
    assert catalog.list() == catalog.list() == NEW_MODELS
    assert cli.installs == [first, claude_program.install]


def test_no_caller_waits_while_another_one_refreshes_an_old_list(
    cli: FakeCli, catalog: cab.ModelCatalog, clock: FakeClock
) -> None:
    old = catalog.list()
    clock.advance(cab.MODELS_SECONDS)
    cli.models = NEW_MODELS
    cli.gate.clear()
    refresh = in_thread(catalog.list)
    wait_until(lambda: len(cli.installs) == 2)
    # The gate is closed: a caller that waited would not return.
    assert [in_thread(catalog.list)() for _ in range(3)] == [old] * 3
    cli.gate.set()
    assert refresh() == catalog.list() == NEW_MODELS and len(cli.installs) == 2


def test_a_refresh_that_fails_leaves_the_old_list(
    cli: FakeCli, catalog: cab.ModelCatalog, clock: FakeClock
) -> None:
    old = catalog.list()
    clock.advance(cab.MODELS_SECONDS)
    cli.models = ()
    assert catalog.list() == old
    cli.models = NEW_MODELS
    # The next look-up waits a little, so that a broken CLI is not started for every caller.
    assert catalog.list() == old
    clock.advance(cab.PROBE_SECONDS)
    assert catalog.list() == NEW_MODELS
