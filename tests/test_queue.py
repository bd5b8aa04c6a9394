"""The queue: the hub wakes who waits, and the worker runs the jobs in order, whatever a run does to it."""
from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import FakeClock, wait_until

import claude_api_bridge as cab

# --- hub ---


def test_a_wake_between_the_look_and_the_wait_is_not_lost() -> None:
    hub = cab.Hub()
    with hub.watch("job") as bell:
        bell.clear()
        hub.wake("job")
        assert bell.wait(10)


def test_a_wake_reaches_all_who_watch_that_key_and_nobody_else() -> None:
    hub = cab.Hub()
    with hub.watch("job") as first, hub.watch("job") as second, hub.watch("other") as other:
        hub.wake("job")
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
    hub.wake("job")                                      # nobody watches: nothing happens


def test_watching_leaves_nothing_behind() -> None:
    hub = cab.Hub()
    with pytest.raises(ZeroDivisionError), hub.watch("job"), hub.watch("job"), hub.watch("other"):
        raise ZeroDivisionError
    assert hub._bells == {}


def test_closing_wakes_all_and_nobody_waits_any_more() -> None:
    hub = cab.Hub()
    with hub.watch("job") as before:
        hub.close()
        assert before.is_set() and hub.is_closed
    with hub.watch("job") as after:
        assert after.is_set()


def test_threads_that_look_again_after_each_wake_see_the_last_state() -> None:
    hub, state, seen = cab.Hub(), [0], []

    def follow() -> None:
        with hub.watch("job") as bell:
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
        hub.wake("job")
    for thread in threads:
        thread.join(10)
    assert seen == [500] * 8


# --- worker ---

Run = Callable[[cab.Work, cab.LiveText, Callable[[], Optional[str]]], cab.Answer]


def echo(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
    return cab.Answer("Echo: " + work.message)


class Scripted:
    """Stands in for ClaudeCli: what a message does is in `script`; any other is echoed."""
    has_spare = False

    def __init__(self) -> None:
        self.script: Dict[str, Run] = {}
        self.seen: List[cab.Work] = []
        self.prepared = 0
        self.is_known: Optional[Callable[[str], bool]] = None
        self.closed = 0

    def run(self, work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        self.seen.append(work)
        return self.script.get(work.message, echo)(work, live, stop_reason)

    def prepare(self) -> None:
        self.prepared += 1

    def keep_only(self, is_known: Callable[[str], bool]) -> None:
        self.is_known = is_known

    def close(self) -> None:
        self.closed += 1


class Queue:
    """A worker over a real store, with nothing behind it."""

    def __init__(self, path: Path, clock: cab.Clock) -> None:
        self.store, self.hub, self.claude, self.log = cab.Store(path, clock), cab.Hub(), Scripted(), []  # type: ignore[var-annotated]
        self.worker = cab.Worker(self.store, self.claude, self.hub, clock, self.log.append, cab.Config())  # type: ignore[arg-type]
        self.token = self.store.add_token(cab.NewToken("app"), cab.new_token())

    def ask(self, message: str, **fields: Any) -> str:
        job_id = self.store.enqueue(self.token.id, cab.Ask(message, **fields))[0].id
        self.hub.wake(cab.Hub.QUEUE)
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
def line(tmp_path: Path) -> Iterator[Queue]:
    found = Queue(tmp_path / "bridge.db", cab.Clock())
    yield found
    found.worker.close()
    found.store.close()


def failing(code: str, text: str) -> Run:
    def run(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        raise cab.RunFailed(code, text)
    return run


def until_stopped(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
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
        cab.Setup(cab.SYSTEM_PROMPT), cab.Setup("Be brief.", "haiku", '{"type":"object"}', "low"),
        cab.Setup(cab.SYSTEM_PROMPT, tools=("Read",), workspace="/srv/work")]
    assert {work.conversation for work in line.claude.seen} == {None}


def test_a_conversation_is_continued_by_session_and_its_history_is_at_hand(line: Queue) -> None:
    line.claude.script["one"] = lambda work, live, stop_reason: cab.Answer("1", session_id="s1", spent_usd=0.5)
    for message in ("one", "two"):
        line.ask(message, conversation="trip")
    line.worker.step()
    line.worker.step()
    first, second = line.claude.seen
    key = (line.token.id, "trip")
    assert (first.conversation, first.session_id, first.spent_usd, first.history()) == (key, None, 0.0, [])
    assert (second.conversation, second.session_id, second.spent_usd, second.history()) == (key, "s1", 0.5, [("one", "1")])


@pytest.mark.parametrize("code", [code for code in cab.RUN_ERRORS if code != "interrupted"])
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
    with line.hub.watch(job) as bell:
        def run(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
            assert bell.is_set() and line.job(job).status == "processing"
            bell.clear()
            return cab.Answer("ok")

        line.claude.script["hi"] = run
        line.worker.step()
        assert bell.is_set() and line.job(job).status == "completed"


def test_the_text_so_far_can_be_read_while_a_job_runs_and_not_after(line: Queue) -> None:
    job, found = line.ask("hi"), []

    def run(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        for text in ("Hé", "llo"):
            live.add(text)
            found.append(line.worker.partial(job))
        assert line.worker.running and line.worker.running[0] == job
        return cab.Answer("Héllo")

    line.claude.script["hi"] = run
    line.worker.step()
    assert found == ["Hé", "Héllo"] and line.worker.partial(job) is None and line.worker.running is None


def test_jobs_are_run_by_a_thread_of_that_name_as_they_come(line: Queue) -> None:
    line.claude.script["who"] = lambda work, live, stop_reason: cab.Answer(threading.current_thread().name)
    line.worker.start()
    wait_until(lambda: line.claude.prepared)
    assert line.outcome(line.ask("who")) == ("completed", "worker")
    assert line.outcome(line.ask("again")) == ("completed", "Echo: again")


def test_an_unexpected_error_is_tried_again_then_given_up_and_the_worker_lives_on(line: Queue) -> None:
    line.claude.script["bug"] = lambda work, live, stop_reason: cab.Answer(str(1 / 0))
    jobs = [line.ask(message) for message in ("bug", "next")]
    line.worker.start()
    assert [line.outcome(job) for job in jobs] == [("error", "interrupted"), ("completed", "Echo: next")]
    assert [work.message for work in line.claude.seen] == ["bug", "bug", "next"] and line.job(jobs[0]).attempts == cab.JOB_ATTEMPTS
    assert line.worker.is_alive and any("ZeroDivisionError" in text for text in line.log)
    assert line.worker.running is None and line.worker.partial(jobs[0]) is None


def test_a_job_is_not_left_behind_when_the_disk_was_full_at_its_end(line: Queue) -> None:
    # Neither the answer nor, a second later, the recovery could be written: the job must be taken up once writing works again.
    statements: List[str] = []

    def run(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
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
    wait_until(lambda: line.job(job).is_finished, 4)
    assert line.outcome(job) == ("completed", "Echo: hi")


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
    def run(work: cab.Work, live: cab.LiveText, stop_reason: Callable[[], Optional[str]]) -> cab.Answer:
        line.store.delete_token(line.token.id)
        return cab.Answer("late")

    line.claude.script["hi"] = run
    line.ask("hi")
    assert line.worker.step() and not any("completed" in text for text in line.log)


def test_closing_puts_a_running_job_back_without_counting_the_attempt(line: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "FINISH_SECONDS", 0.0)
    line.claude.script["long"] = until_stopped
    job, waits = line.ask("long"), line.ask("waits")
    line.worker.start()
    wait_until(lambda: line.worker.running)
    line.worker.close()
    found = line.job(job)
    assert (found.status, found.attempts, found.started_at) == ("queued", 0, None) and line.store.queue_position(found) == 1
    assert line.job(waits).status == "queued" and line.claude.closed == 1 and not line.worker.is_alive


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


def test_an_idle_worker_deletes_old_jobs_and_says_which_tokens_are_left(line: Queue, tmp_path: Path) -> None:
    past = FakeClock(cab.Clock.now() - 8 * 86_400)
    earlier = cab.Store(tmp_path / "bridge.db", past)
    old = earlier.enqueue(line.token.id, cab.Ask("old"))[0]
    earlier.complete(earlier.claim() or old, cab.Answer("ok"))
    earlier.close()
    fresh = line.ask("fresh")
    line.worker.start()
    wait_until(lambda: line.store.job(old.id) is None)
    is_known = wait_until(lambda: line.claude.is_known)
    assert line.outcome(fresh)[0] == "completed" and is_known(line.token.id) and not is_known("revoked")
