"""The service: what the bridge can do, without HTTP, over a real store."""
from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab


class Bench:
    """A service over a store, with no worker: the tests finish the jobs. clock: moved by hand, waits are real."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self.clock, self.folder, self.hub = clock, folder, cab.Hub()
        self.store = cab.Store(folder / "bridge.db", clock)
        self.live: Dict[str, str] = {}
        self.service = cab.Service(self.store, self.hub, clock, folder, self.live.get)

    def caller(self, name: str = "app", **fields: Any) -> cab.Caller:
        token, secret = self.service.create_token(cab.NewToken(name, **fields))
        return self.service.authenticate(secret)

    def ask(self, caller: cab.Caller, message: str = "hi", **fields: Any) -> cab.Job:
        return self.service.ask(caller, cab.Ask(message, **fields))[0]

    def run(self, answer: str = "ok") -> cab.Job:
        """Does the worker's part for the oldest job."""
        job = self.store.claim()
        assert job is not None
        self.store.complete(job, cab.Answer(answer))
        self.hub.wake(job.id)
        return job


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
    with bench.hub.watch(cab.Hub.QUEUE) as bell:
        job, position = bench.service.ask(caller, cab.Ask("hi", model="haiku"))
        assert bell.is_set()
    stored = bench.store.job(job.id)
    assert position == 1 and stored and (stored.message, stored.model, stored.conversation) == ("hi", "haiku", None)


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
    running = bench.store.claim()
    assert running and running.id == first.id
    bench.live[first.id] = "so f"
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.position, view.partial) == ("processing", 0, "so f")
    assert bench.service.poll(caller, second.id)[1:] == (1, None)
    bench.store.complete(running, cab.Answer("so far, so good"))
    view = bench.service.poll(caller, first.id)
    assert (view.job.status, view.job.response, view.partial) == ("completed", "so far, so good", None)


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
    wait_until(lambda: bench.hub._bells)
    bench.run("here")
    assert result().job.response == "here" and time.monotonic() - began < 5


def test_a_poll_that_waits_goes_on_through_wakes_that_are_not_the_end(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._bells)
    running = bench.store.claim()
    for _ in range(50):
        bench.hub.wake(job.id)
    bench.store.fail(running or job, "timeout", "x")
    bench.hub.wake(job.id)
    assert result().job.error_code == "timeout"


def test_a_poll_waits_no_longer_than_it_was_told(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    assert bench.service.poll(caller, job.id, wait=0.1).job.status == "queued"
    assert 0.1 <= time.monotonic() - began < 5
    assert bench.hub._bells == {}


def test_closing_ends_every_wait_with_the_present_state(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=30))
    wait_until(lambda: bench.hub._bells)
    bench.hub.close()
    assert result().job.status == "queued"


def test_a_wait_ends_when_the_token_is_revoked(bench: Bench) -> None:
    caller = bench.caller()
    job = bench.ask(caller)
    began = time.monotonic()
    result = in_thread(lambda: bench.service.poll(caller, job.id, wait=3))
    wait_until(lambda: bench.hub._bells)
    bench.service.revoke_token(caller.token.id)
    assert isinstance(result(), cab.NotFound) and time.monotonic() - began < 2


def test_revoking_a_token_rings_for_its_unfinished_jobs(bench: Bench) -> None:
    caller = bench.caller()
    jobs = [bench.ask(caller) for _ in range(2)]
    bench.store.claim()
    with bench.hub.watch(jobs[0].id) as running, bench.hub.watch(jobs[1].id) as waiting:
        bench.service.revoke_token(caller.token.id)
        assert running.is_set() and waiting.is_set()


def test_only_one_s_own_unfinished_job_is_that(bench: Bench) -> None:
    owner, admin = bench.caller(), bench.caller(admin=True)
    done, waits = bench.ask(owner), bench.ask(owner)
    bench.run()
    assert [bench.service.is_own_unfinished(owner, each) for each in (done.id, waits.id, "none")] == [False, True, False]
    assert not bench.service.is_own_unfinished(admin, waits.id)


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
