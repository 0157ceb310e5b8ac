"""What runs next: bounded, newest of a document first, interactive before background."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infilld.engine.errors import Busy, Cancelled
from infilld.engine.request import InfillRequest, Span
from infilld.engine.scheduler import (
    MAX_LIVE,
    MAX_QUEUED,
    Job,
    Schedule,
    Struck,
    Superseded,
    fitting,
)


def job(document: str | None = None, *, background: bool = False, deadline_ms: int = 1000) -> Job:
    request = InfillRequest(
        text="",
        spans=(Span(0, 0),),
        document=document,
        background=background,
        deadline_ms=deadline_ms,
    )
    return Job(request, None, lambda job: None)


def is_superseded(one: Job) -> bool:
    try:
        one.check()
    except Superseded:
        return True
    return False


def live(schedule: Schedule, *jobs: Job) -> None:
    for each in jobs:
        schedule.add(each)
    assert schedule.admit() == [*jobs]


def test_so_many_jobs_are_live_and_the_oldest_begin() -> None:
    schedule, jobs = Schedule(), [job() for _ in range(MAX_LIVE + 2)]
    for each in jobs:
        schedule.add(each)
    assert schedule.admit() == jobs[:MAX_LIVE]
    assert schedule.admit() == []
    schedule.remove(jobs[1])
    assert schedule.admit() == [jobs[MAX_LIVE]]
    assert list(schedule.waiting) == jobs[MAX_LIVE + 1 :]


def test_a_newer_job_supersedes_those_of_its_document_that_wait_or_live() -> None:
    schedule = Schedule(max_live=1)
    first, second, other, newest = job("a"), job("a"), job("b"), job("a")
    live(schedule, first)
    # A live one is told; one that waits is out at once.
    assert schedule.add(second) == []
    schedule.add(other)
    assert schedule.add(newest) == [second]
    assert [is_superseded(each) for each in (first, second, other, newest)] == [1, 1, 0, 0]
    assert list(schedule.waiting) == [other, newest]
    assert list(schedule.live) == [first]


def test_a_background_job_supersedes_no_other_kind() -> None:
    schedule = Schedule()
    real, old, new = job("a"), job("a", background=True), job("a", background=True)
    live(schedule, real)
    assert schedule.add(old) == []
    assert schedule.add(new) == [old]
    assert not is_superseded(real)
    assert schedule.add(job("a")) == [new]
    assert is_superseded(real)


def test_the_background_waits_for_everybody_else() -> None:
    schedule, behind = Schedule(), job(background=True)
    live(schedule, behind)
    assert schedule.turn() == [behind]
    real = job()
    schedule.add(real)
    # Suspended as soon as somebody waits.
    assert schedule.turn() == []
    schedule.add(job(background=True))
    assert schedule.admit() == [real]
    assert schedule.turn() == [real]
    schedule.remove(real)
    assert schedule.turn() == [behind]
    assert schedule.admit() == []


def test_the_background_does_not_begin_beside_others() -> None:
    schedule, behind, real = Schedule(), job(background=True), job()
    schedule.add(behind)
    schedule.add(real)
    assert schedule.admit() == [real]
    assert schedule.admit() == []
    schedule.remove(real)
    assert schedule.admit() == [behind]


def test_a_full_queue_changes_nothing() -> None:
    schedule, waits = Schedule(max_live=1), job("a")
    live(schedule, waits)
    for _ in range(MAX_QUEUED):
        schedule.add(job())
    with pytest.raises(Busy):
        schedule.add(job("a"))
    assert not is_superseded(waits)
    # Each kind has its own bound.
    schedule.add(job(background=True))
    assert len(schedule.waiting) == MAX_QUEUED + 1


def test_only_who_waits_expires() -> None:
    schedule, begun, waits, later = (
        Schedule(max_live=1),
        job(deadline_ms=5),
        job(deadline_ms=5),
        job(deadline_ms=9_000),
    )
    live(schedule, begun)
    schedule.add(waits)
    schedule.add(later)
    at = waits.deadline_at
    assert at is not None
    assert schedule.expired(at - 1e-6) == []
    assert schedule.expired(at) == [waits]
    assert schedule.expired(at) == []
    assert list(schedule.waiting) == [later]


def test_the_reason_a_job_ends_early_is_kept() -> None:
    struck, cancelled = job(), job()
    struck.strike()
    with pytest.raises(Struck):
        struck.check()
    cancelled.supersede()
    cancelled.cancel()
    with pytest.raises(Cancelled):
        cancelled.check()


@pytest.mark.parametrize(
    ("sizes", "limit", "taken"),
    [
        ([], 10, []),
        ([4, 4, 4], 10, [0, 1]),
        ([4, 9, 6], 10, [0, 2]),
        ([40, 1], 10, [0]),
        ([10, 0], 10, [0, 1]),
    ],
)
def test_passes_share_what_fits(sizes: list[int], limit: int, taken: list[int]) -> None:
    assert fitting(list(enumerate(sizes)), limit) == taken


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20))
def test_nobody_starves(sizes: list[int], limit: int) -> None:
    """Whoever waits longest is taken, so all come within as many rounds as there are."""
    waiting, taken = list(enumerate(sizes)), set()
    for _ in sizes:
        now = fitting(waiting, limit)
        assert now[0] == waiting[0][0]
        assert len(now) == 1 or sum(sizes[each] for each in now) <= limit
        taken |= set(now)
        waiting = [each for each in waiting if each[0] not in now] + [
            each for each in waiting if each[0] in now
        ]
    assert taken == set(range(len(sizes)))


@settings(deadline=None)
@given(st.data())
def test_promises_hold_after_every_operation(data: st.DataObject) -> None:
    schedule, opened, ended = Schedule(max_live=2), [], set()
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["add", "admit", "remove", "withdraw", "expired"]))
        if what == "add":
            new = job(
                data.draw(st.sampled_from([None, "a", "b"])),
                background=data.draw(st.booleans()),
                deadline_ms=data.draw(st.sampled_from([1, 10_000])),
            )
            try:
                ended |= set(schedule.add(new))
            except Busy:
                assert len(schedule.waiting) >= MAX_QUEUED
                continue
            opened.append(new)
        elif what == "admit":
            schedule.admit()
        elif what == "remove" and schedule.live:
            gone = data.draw(st.sampled_from(schedule.live))
            schedule.remove(gone)
            ended.add(gone)
        elif what == "withdraw" and opened:
            gone = data.draw(st.sampled_from(opened))
            if schedule.withdraw(gone):
                ended.add(gone)
        elif what == "expired" and opened:
            ended |= set(schedule.expired(opened[-1].arrived_at + 5))
        schedule.check()
        # No job is lost, and none ends twice.
        assert {*schedule.waiting, *schedule.live} == set(opened) - ended
        kinds = {each.request.background for each in schedule.turn()}
        assert len(kinds) <= 1
        assert True not in kinds or not schedule.is_interactive
