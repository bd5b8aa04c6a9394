"""The service: what the bridge can do, without HTTP, over a real store."""
from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab


class Bench:
    """A service over a store, with no worker: the tests finish the jobs. clock: moved by hand, waits are real."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self.clock, self.folder, self.hub = clock, folder, cab.Notifier()
        self.store = cab.Database(folder / "bridge.db", clock)
        self.live: Dict[str, cab.LiveText] = {}
        self.rest: Optional[cab.Pause] = None
        self.service = cab.Service(self.store, self.hub, clock, folder, live=self.live.get, rest=lambda model: self.rest)

    def caller(self, name: str = "app", **fields: Any) -> cab.Caller:
        token, secret = self.service.create_token(cab.NewToken(name, **fields))
        return self.service.authenticate(secret)

    def ask(self, caller: cab.Caller, message: str = "hi", **fields: Any) -> cab.Job:
        return self.service.ask(caller, cab.Ask(message, **fields)).job

    def run(self, answer: str = "ok") -> cab.Job:
        """Does the worker's part for the oldest job."""
        job = self.store.claim()
        assert job is not None
        self.store.complete(job, cab.Answer(answer))
        self.hub.notify(job.id)
        return job

    def begin(self) -> Tuple[cab.Job, cab.LiveText]:
        """Claims the oldest job. -> the job, and its text, which rings for those who follow it."""
        job = self.store.claim()
        assert job is not None
        live = self.live[job.id] = cab.LiveText(job.generation, lambda: self.hub.notify(cab.Notifier.TEXT + job.id))
        self.hub.notify(job.id)
        live.begin("model-1")
        return job, live

    def end(self, job: cab.Job, text: str) -> None:
        """Completes it with the text that was heard, as the worker does."""
        live = self.live[job.id]
        live.finish(text)
        self.store.complete(job, cab.Answer(text, model="model-1"), live.generation)
        del self.live[job.id]
        self.hub.notify(job.id)


class Time(FakeClock):
    """Moments are moved by hand; spans are real, for those who wait."""

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path, Time())
    yield found
    found.hub.close()
    found.store.close()


def in_thread(task: Callable[[], Any]) -> Callable[[], Any]:
    """Begins a task. -> what waits for its result, at most 10 s."""
    found: List[Any] = []

    def run() -> None:
        try:
            found.append(task())
        except cab.BridgeError as error:
            found.append(error)

    thread = threading.Thread(target=run, name="task")
    thread.start()

    def result() -> Any:
        thread.join(10)
        return found[0]

    return result


# --- who asks ---


def test_a_token_says_who_asks_and_its_use_is_noted(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app", admin=True))
    bench.clock.advance(5)
    caller = bench.service.authenticate(secret)
    assert (caller.token.id, caller.is_admin) == (token.id, True)
    bench.service.check_store()                                             # nobody waits for the note: this comes after it
    assert (bench.store.token(token.id) or token).last_used_at == bench.clock.now()


def test_what_is_no_token_of_ours_is_refused(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app"))
    for wrong in ("", secret[:-1], secret.upper(), secret + " ", token.prefix, cab.digest(secret), token.id, cab.new_token(), "é\0' OR 1=1 --"):
        with pytest.raises(cab.InvalidToken):
            bench.service.authenticate(wrong)


def test_expired_and_revoked_tokens_are_refused_and_their_use_is_not_noted(bench: Bench) -> None:
    brief, brief_secret = bench.service.create_token(cab.NewToken("brief", expires_in_days=1))
    gone, gone_secret = bench.service.create_token(cab.NewToken("gone"))
    bench.clock.advance(86_400)
    bench.service.revoke_token(gone.id)
    for secret in (brief_secret, gone_secret):
        with pytest.raises(cab.InvalidToken):
            bench.service.authenticate(secret)
    assert [(token.id, token.last_used_at) for token in bench.service.tokens()] == [(brief.id, None)]


# --- ask and poll ---


def test_an_ask_is_in_the_store_on_return_and_wakes_the_worker(bench: Bench) -> None:
    caller = bench.caller()
    with bench.hub.subscribe(cab.Notifier.QUEUE) as bell:
        job, position, is_new = bench.service.ask(caller, cab.Ask("hi", model="haiku"))
        assert bell.wait(0)
    stored = bench.store.job(job.id)
    assert (position, is_new) == (1, True) and stored and (stored.message, stored.model, stored.conversation) == ("hi", "haiku", None)


@pytest.mark.parametrize("mode, given, stored", [("stateless", None, None), ("stateful", None, "default"), ("stateful", "trip", "trip")])
def test_only_a_stateful_token_has_conversations(bench: Bench, mode: str, given: Optional[str], stored: Optional[str]) -> None:
    job = bench.ask(bench.caller(session_mode=mode), conversation=given)
    assert (bench.store.job(job.id) or job).conversation == stored


def test_a_conversation_with_a_stateless_token_is_refused_and_nothing_is_queued(bench: Bench) -> None:
    caller = bench.caller()
    with pytest.raises(cab.InvalidRequest) as refused:
        bench.ask(caller, conversation="trip")
    assert refused.value.extra == {"field": "conversation"} and "stateful" in str(refused.value)
    assert bench.service.counts() == {"tokens": 1}


def test_a_job_is_shown_to_its_owner_and_to_admins_and_unknown_to_all_others(bench: Bench) -> None:
    owner, admin, other = bench.caller(), bench.caller(admin=True), bench.caller()
    job = bench.ask(owner)
    assert bench.service.poll(owner, job.id).job.id == bench.service.poll(admin, job.id).job.id == job.id
    refusals = []
    for caller, job_id in ((other, job.id), (other, "no-such-id"), (owner, "no-such-id"), (admin, ""), (owner, job.id.upper())):
        with pytest.raises(cab.NotFound) as refused:
            bench.service.poll(caller, job_id, wait=30)
        refusals.append(cab.error_body(refused.value))
    assert refusals == [{"error": "Request not found", "code": "not_found"}] * 5      # nobody learns which ids exist


def test_a_poll_follows_a_job_from_the_queue_to_its_answer(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller, "first"), bench.ask(caller, "second")
    assert [bench.service.poll(caller, job.id).position for job in (first, second)] == [1, 2]
    running, live = bench.begin()
    assert running.id == first.id
    live.add("so f")
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.position, view.place, view.partial) == ("processing", 0, 1, "so f")
    view = bench.service.poll(caller, second.id)
    assert (view.job.status, view.position, view.place, view.partial) == ("queued", 1, 2, None)
    bench.end(running, "so far, so good")
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.job.response, view.position, view.partial) == ("completed", "so far, so good", 0, None)


def test_a_poll_says_what_a_job_waits_for_besides_its_turn(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller), bench.ask(caller)
    bench.rest = cab.Pause("usage_limit", bench.clock.now() + 60)
    assert [bench.service.poll(caller, job.id).rest for job in (first, second)] == [bench.rest] * 2
    _, live = bench.begin()
    bench.rest = None
    live.pause(cab.Pause("overloaded", bench.clock.now() + 2))
    assert [bench.service.poll(caller, job.id).rest for job in (first, second)] == [live.rest, None]
    live.begin("model-1")
    assert bench.service.poll(caller, first.id).rest is None


def test_the_text_of_a_run_that_gave_its_job_back_is_not_told(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    running, live = bench.begin()
    live.add("hardly begun")
    live.pause(cab.Pause("overloaded", bench.clock.now() + 2))
    bench.store.requeue(running)                             # its text leaves a moment later
    view = bench.service.poll(caller, job.id)
    assert (view.job.status, view.partial, view.rest) == ("queued", None, None)
    assert [event.kind for event, _ in itertools.islice(bench.service.follow(caller, job.id), 1)] == ["queued"]


def test_a_poll_of_a_finished_job_never_waits(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    bench.run()
    began = time.monotonic()
    assert bench.service.poll(caller, job.id, wait=30).job.is_finished and time.monotonic() - began < 5


def test_a_poll_that_waits_returns_at_once_when_the_job_is_finished(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._waiters)
    bench.run("here")
    assert result().job.response == "here" and time.monotonic() - began < 5


def test_a_poll_that_waits_goes_on_through_wakes_that_are_not_the_end(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._waiters)
    running = bench.store.claim()
    for _ in range(50):
        bench.hub.notify(job.id)
    bench.store.fail(running or job, "timeout", "x")
    bench.hub.notify(job.id)
    assert result().job.error_code == "timeout"


def test_a_poll_waits_no_longer_than_it_was_told(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    assert bench.service.poll(caller, job.id, wait=0.1).job.status == "queued"
    assert 0.1 <= time.monotonic() - began < 5
    assert bench.hub._waiters == {}


def test_closing_ends_every_wait_with_the_present_state(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._waiters)
    bench.hub.close()
    assert result().job.status == "queued"


def test_a_wait_ends_when_the_token_is_revoked(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._waiters)
    bench.service.revoke_token(caller.token.id)
    assert isinstance(result(), cab.InvalidToken)


def test_a_token_that_goes_between_two_looks_of_a_wait_is_told_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, check = bench.caller(), bench.service.check_token
    job = bench.ask(caller)

    def goes_then(who: cab.Caller) -> None:                  # with its requests, so that none is found any more
        check(who)
        bench.service.revoke_token(who.token.id)

    monkeypatch.setattr(cab, "RECHECK_SECONDS", 0.01)
    monkeypatch.setattr(bench.service, "check_token", goes_then)
    with pytest.raises(cab.InvalidToken):
        bench.service.poll(caller, job.id, wait=30)


def test_revoking_a_token_rings_for_its_unfinished_jobs(bench: Bench) -> None:
    caller = bench.caller()
    jobs = [bench.ask(caller) for _ in range(2)]
    bench.store.claim()
    with bench.hub.subscribe(jobs[0].id) as running, bench.hub.subscribe(jobs[1].id) as waiting:
        bench.service.revoke_token(caller.token.id)
        assert running.wait(0) and waiting.wait(0)


def test_only_one_s_own_unfinished_job_is_that(bench: Bench) -> None:
    owner, admin = bench.caller(), bench.caller(admin=True)
    done, waits = bench.ask(owner), bench.ask(owner)
    bench.run()
    assert [bench.service.is_own_unfinished(owner, each) for each in (done.id, waits.id, "none")] == [False, True, False]
    assert not bench.service.is_own_unfinished(admin, waits.id)


# --- the choices of a token ---


@pytest.mark.parametrize("models, given, stored", [
    (None, None, None), (None, "opus", "opus"), (("haiku", "opus"), None, "haiku"), (("haiku", "opus"), "opus", "opus"),
    (("default", "haiku"), None, None)])
def test_the_first_of_a_token_s_models_is_its_default(bench: Bench, models: Any, given: Optional[str], stored: Optional[str]) -> None:
    job = bench.ask(bench.caller(models=models), model=given)
    assert (bench.store.job(job.id) or job).model == stored


def test_another_model_is_refused_with_those_that_would_do_and_nothing_is_queued(bench: Bench) -> None:
    caller = bench.caller(models=("haiku", "opus"))
    with pytest.raises(cab.ModelNotAllowed, match="may not use the model sonnet. Use: haiku, opus") as refused:
        bench.ask(caller, model="sonnet")
    assert refused.value.extra == {"field": "model"} and bench.service.counts() == {"tokens": 1}


def test_the_same_key_leads_to_the_same_job_which_wakes_nobody_twice(bench: Bench) -> None:
    caller, other = bench.caller(), bench.caller()
    first = bench.service.ask(caller, cab.Ask("hi"), "key")
    again = bench.service.ask(caller, cab.Ask("hi", wait=5, stream=True), "key")      # how the answer is wanted is no other question
    assert (again.job, again.position, again.is_new) == (first.job, 1, False)
    assert bench.service.ask(other, cab.Ask("hi"), "key").job.id != first.job.id
    for differs in (cab.Ask("ho"), cab.Ask("hi", model="haiku"), cab.Ask("hi", system_prompt="x"), cab.Ask("hi", effort="low")):
        with pytest.raises(cab.IdempotencyConflict):
            bench.service.ask(caller, differs, "key")
    bench.run()
    assert bench.service.ask(caller, cab.Ask("hi"), "key")[1:] == (0, False)
    assert bench.service.counts() == {"tokens": 2, "completed": 1, "queued": 1}


def test_a_full_queue_says_when_the_plan_gives_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise cab.retry_later(cab.QueueFull, "", 10)

    caller = bench.caller()
    monkeypatch.setattr(cab.Database, "enqueue", refuse)
    resting = "Queue is full: the plan's limit is used up until 2027-01-15T08:01:30.500Z."
    for rest, text, seconds in ((None, "Queue is full. Please try again later.", 10),
                                (cab.Pause("usage_limit", bench.clock.now() + 90.5), resting, 91)):
        bench.rest = rest
        with pytest.raises(cab.QueueFull) as full:
            bench.ask(caller)
        assert (str(full.value), full.value.headers, full.value.extra) == (text, (("Retry-After", str(seconds)),), {"retryAfter": seconds})


# --- follow ---


class Reader:
    """Follows a job in a thread of its own, until the stream ends or `left` is set. told: (kind, offset, text) of each step."""

    def __init__(self, bench: Bench, caller: cab.Caller, job_id: str, after: int = 0, place: int = 0) -> None:
        self.told: List[Tuple[str, int, str]] = []
        self.views: List[Optional[cab.JobView]] = []
        self.left = threading.Event()
        self._events = bench.service.follow(caller, job_id, after, place, self.left.is_set)
        self._end = in_thread(self._read)

    def _read(self) -> None:
        for event, view in self._events:
            self.views.append(view)
            self.told.append((event.kind, event.offset, event.text))

    def saw(self, *told: Tuple[str, int, str]) -> None:
        """Waits until exactly this was told so far."""
        wait_until(lambda: self.told == list(told) or len(self.told) > len(told))
        assert self.told == list(told)

    def end(self) -> Any:
        """Waits for the end. -> the error that ended it, or None."""
        return self._end()


def test_a_reader_is_told_each_step_as_it_comes(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    reader = Reader(bench, caller, job.id)
    told: List[Tuple[str, int, str]] = [("queued", 0, "")]
    reader.saw(*told)
    running, live = bench.begin()
    told.append(("started", 0, ""))
    reader.saw(*told)
    for text, offset in (("one ", 4), ("two", 7)):
        live.add(text)
        told.append(("delta", offset, text))
        reader.saw(*told)
    bench.end(running, "one two!")
    assert reader.end() is None
    assert reader.told == [*told, ("delta", 8, "!"), ("completed", 8, "")]
    assert reader.views[-1] and reader.views[-1].job.response == "one two!" and reader.views[0] and reader.views[0].place == 1
    assert bench.hub._waiters == {}


def test_a_place_that_the_caller_knows_is_not_told_again(bench: Bench) -> None:
    caller = bench.caller()
    first, second = bench.ask(caller), bench.ask(caller)
    reader = Reader(bench, caller, second.id, place=2)
    wait_until(lambda: bench.hub._waiters)
    bench.service.cancel(caller, first.id)
    bench.hub.notify(second.id)
    reader.saw(("queued", 0, ""))
    assert reader.views[0] and reader.views[0].place == 1
    reader.left.set()
    bench.hub.notify(second.id)
    assert reader.end() is None


def test_a_job_that_waits_again_begins_anew_for_its_readers(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    running, live = bench.begin()
    live.add("half an ans")
    reader = Reader(bench, caller, job.id)
    reader.saw(("started", 0, ""), ("delta", 11, "half an ans"))
    bench.rest = cab.Pause("usage_limit", bench.clock.now() + 60)
    live.restart()
    bench.store.requeue(running, live.generation)
    del bench.live[job.id]
    bench.hub.notify(job.id)
    told = [("started", 0, ""), ("delta", 11, "half an ans"), ("queued", 0, "")]
    reader.saw(*told)
    assert reader.views[-1] and reader.views[-1].rest == bench.rest
    again, live = bench.begin()
    assert live.generation == 1
    bench.end(again, "whole")
    assert reader.end() is None and reader.told == [*told, ("started", 0, ""), ("delta", 5, "whole"), ("completed", 5, "")]


def test_following_what_is_not_there_or_not_ones_own_is_refused_at_once(bench: Bench) -> None:
    owner, other = bench.caller(), bench.caller()
    job = bench.ask(owner)
    for caller, job_id in ((other, job.id), (owner, "none"), (owner, "")):
        with pytest.raises(cab.NotFound):
            bench.service.follow(caller, job_id)                             # and not when the first event is wanted


def test_a_reader_is_sent_away_when_its_token_is_revoked_or_expires(bench: Bench) -> None:
    caller, brief = bench.caller(), bench.caller(admin=True, expires_in_days=1)
    job = bench.ask(caller)
    readers = [Reader(bench, each, job.id) for each in (brief, caller)]
    for reader in readers:
        reader.saw(("queued", 0, ""))
    bench.clock.advance(86_400)
    bench.hub.notify(job.id)
    assert isinstance(readers[0].end(), cab.InvalidToken)
    bench.service.revoke_token(caller.token.id)
    assert isinstance(readers[1].end(), (cab.InvalidToken, cab.NotFound))    # the job goes with its token, perhaps during a look
    assert bench.hub._waiters == {}


def test_closing_ends_every_stream(bench: Bench) -> None:
    caller = bench.caller()
    readers = [Reader(bench, caller, bench.ask(caller).id) for _ in range(3)]
    for reader in readers:
        reader.saw(("queued", 0, ""))
    bench.hub.close()
    assert [reader.end() for reader in readers] == [None] * 3 and [len(reader.told) for reader in readers] == [1] * 3


# --- cancel, lists, conversations, usage ---


def test_a_job_that_waits_or_runs_is_cancelled_once(bench: Bench) -> None:
    owner, other, admin = bench.caller(), bench.caller(), bench.caller(admin=True)
    running, waiting, done = (bench.ask(owner) for _ in range(3))
    bench.store.claim()
    for job, caller in ((running, owner), (waiting, admin)):
        with pytest.raises(cab.NotFound):
            bench.service.cancel(other, job.id)
        with bench.hub.subscribe(job.id) as bell:
            view = bench.service.cancel(caller, job.id)
            assert bell.wait(0)
        assert (view.job.status, view.job.error_code, view.job.completed_at) == ("error", "cancelled", bench.clock.now())
        with pytest.raises(cab.AlreadyFinished):
            bench.service.cancel(caller, job.id)
    assert not bench.store.complete(running, cab.Answer("too late"))
    bench.run()
    with pytest.raises(cab.AlreadyFinished):
        bench.service.cancel(owner, done.id)
    assert bench.service.counts() == {"tokens": 3, "error": 2, "completed": 1}


def test_a_list_holds_one_s_own_jobs_and_for_an_admin_all(bench: Bench) -> None:
    one, two, admin = bench.caller(), bench.caller(), bench.caller(admin=True)
    jobs = [bench.ask(caller).id for caller in (one, two, one, admin, one)]
    bench.run()
    bench.store.claim()

    def listed(caller: cab.Caller, *choices: Any) -> Tuple[List[int], Optional[int]]:
        views, following = bench.service.jobs(caller, *choices)
        return [jobs.index(view.job.id) for view in views], following

    assert [listed(caller)[0] for caller in (one, two, admin)] == [[4, 2, 0], [1], [4, 3, 2, 1, 0]]
    assert listed(admin, ("queued",)) == ([4, 3, 2], None) and listed(admin, ("processing", "completed"))[0] == [1, 0]
    found, following = listed(admin, (), None, 2)
    assert found == [4, 3] and listed(admin, (), following, 2)[0] == [2, 1]
    assert [(view.position, view.place) for view in bench.service.jobs(admin)[0]] == [(3, 4), (2, 3), (1, 2), (0, 1), (0, 0)]


def test_conversations_are_one_s_own_and_a_deleted_one_begins_afresh(bench: Bench) -> None:
    caller, other = bench.caller(session_mode="stateful"), bench.caller(session_mode="stateful")
    for name, message in (("a", "first"), ("b", "second"), ("a", "third")):
        bench.clock.advance(1)
        bench.ask(caller, message, conversation=name)
        bench.run()
    assert [(each.name, each.turns) for each in bench.service.conversations(caller)] == [("a", 2), ("b", 1)]
    assert bench.service.conversations(other) == []
    for each, name in ((other, "a"), (caller, "c"), (caller, "\ud800")):
        with pytest.raises(cab.NotFound, match="Conversation not found"):
            bench.service.delete_conversation(each, name)
    bench.service.delete_conversation(caller, "a")
    assert [each.name for each in bench.service.conversations(caller)] == ["b"]
    job = bench.ask(caller, "fourth", conversation="a")
    assert bench.store.history(job) == [] and len(bench.service.jobs(caller)[0]) == 4


def test_usage_is_summed_by_day_and_token_and_shows_the_plan(bench: Bench) -> None:
    caller, admin = bench.caller("app"), bench.caller("boss", admin=True)
    bench.ask(caller)
    bench.run()
    bench.clock.advance(86_400)
    bench.ask(admin)
    bench.store.save_plan_limits([cab.RateLimitWindow("five_hour", "allowed", 0.5, None, bench.clock.now())])
    bench.rest = cab.Pause("usage_limit", bench.clock.now() + 60)
    for asker, days, tokens in ((caller, 30, ["app"]), (caller, 1, []), (admin, 2, ["app", "boss"]), (admin, 1, ["boss"])):
        report = bench.service.usage(asker, days)
        assert [report.names[row.token_id] for row in report.rows] == tokens
        assert report.since == cab.day_of(bench.clock.now() - (days - 1) * 86_400)
        assert ([window.kind for window in report.windows], report.rest) == (["five_hour"], bench.rest)


# --- tokens ---


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("tools", ["read", "web", "all", ("Read", "Bash(ls)")], ids=str)
def test_a_token_with_tools_has_a_workspace_of_its_own_closed_to_others(bench: Bench, tools: Any) -> None:
    tokens = [bench.service.create_token(cab.NewToken("t", tools=tools))[0] for _ in range(2)]
    folders = [Path(str(token.workspace)) for token in tokens]
    assert folders[0] != folders[1] and all(folder.is_dir() and not any(folder.iterdir()) for folder in folders)
    assert {each.stat().st_mode & 0o777 for folder in folders for each in (folder, folder.parent)} == {0o700}
    assert bench.folder in folders[0].parents and bench.store.token(tokens[0].id) == tokens[0]


def test_a_token_without_tools_has_none(bench: Bench) -> None:
    assert bench.service.create_token(cab.NewToken("t"))[0].workspace is None
    assert not (bench.folder / "workspaces").exists()


def test_a_workspace_that_exists_is_used_as_it_is(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    token, _ = bench.service.create_token(cab.NewToken("t", tools="read"), tmp_path / "mine")
    assert token.workspace == str(tmp_path / "mine") and not (tmp_path / "workspaces").exists()
    assert os.name != "posix" or (tmp_path / "mine").stat().st_mode & 0o777 == 0o755


def test_a_token_that_is_refused_leaves_no_workspace_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "TOKENS", 1)
    bench.service.create_token(cab.NewToken("t", tools="read"))
    with pytest.raises(cab.TokenLimit):
        bench.service.create_token(cab.NewToken("t", tools="read"))
    assert len(list((bench.folder / "workspaces").iterdir())) == 1


def test_a_secret_is_told_once_and_fits_its_token(bench: Bench) -> None:
    token, secret = bench.service.create_token(cab.NewToken("app", "stateful", 30, False, "none"))
    assert secret.startswith(token.prefix) and len(token.prefix) == 12 and bench.service.authenticate(secret).token.id == token.id
    assert secret not in repr(bench.service.tokens())


def test_revoking_what_is_not_there_is_not_found_and_the_last_admin_stays(bench: Bench) -> None:
    admin = bench.caller(admin=True)
    with pytest.raises(cab.LastAdmin):
        bench.service.revoke_token(admin.token.id)
    app = bench.caller()
    bench.service.revoke_token(app.token.id)
    for token_id in (app.token.id, "none", ""):
        with pytest.raises(cab.NotFound) as refused:
            bench.service.revoke_token(token_id)
        assert str(refused.value) == "Token not found"
    assert bench.service.has_admin() and [token.id for token in bench.service.tokens()] == [admin.token.id]


def test_a_database_that_cannot_be_written_is_told(bench: Bench) -> None:
    bench.service.check_store()
    bench.store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(cab.Unavailable):
        bench.service.check_store()
