# SPDX-License-Identifier: BSD-3-Clause
"""jobs.py: what query-jobs, job-cancel and job-dismiss say, and the events that go with it."""

from __future__ import annotations

import pytest

from replication.errors import CommandError
from replication.events import Event, EventHub
from replication.jobs import Job, JobList


class Board:
    """A job list and the events that it has emitted, as (id, status)."""

    def __init__(self) -> None:
        hub = EventHub()
        hub.subscribe(self._note)
        self.jobs = JobList(hub)
        self.told: list[tuple[str, str]] = []

    def _note(self, event: Event) -> None:
        assert event["event"] == "JOB_STATUS_CHANGE"
        self.told.append((event["data"]["id"], event["data"]["status"]))


def make(kind: str = "commit", disk: str = "disk0") -> Job:
    """A job at 3 of 7 bytes."""
    return Job(kind, disk, lambda: 7, lambda: 3)


def test_a_running_job_is_listed_with_its_progress() -> None:
    board = Board()
    board.jobs.add(make())
    assert board.jobs.query() == [
        {"id": "commit-disk0", "type": "commit", "status": "running", "current-progress": 3, "total-progress": 7}
    ]
    assert board.told == [("commit-disk0", "running")]


def test_a_job_that_went_well_is_gone_and_has_told_so() -> None:
    board = Board()
    job = board.jobs.add(make())
    board.jobs.conclude(job)
    assert board.jobs.query() == []
    assert board.told == [("commit-disk0", status) for status in ("running", "concluded", "null")]


def test_a_job_that_failed_stays_with_its_error_until_it_is_dismissed() -> None:
    board = Board()
    job = board.jobs.add(make())
    board.jobs.conclude(job, "no room")
    (shown,) = board.jobs.query()
    assert (shown["status"], shown["error"]) == ("concluded", "no room")
    board.jobs.dismiss("commit-disk0")
    assert board.jobs.query() == []
    assert board.told == [("commit-disk0", status) for status in ("running", "concluded", "null")]


def test_a_job_concludes_once() -> None:
    board = Board()
    job = board.jobs.add(make())
    board.jobs.conclude(job, "first")
    board.jobs.conclude(job, "second")
    board.jobs.conclude(job)
    assert [shown["error"] for shown in board.jobs.query()] == ["first"]
    board.jobs.dismiss("commit-disk0")
    board.jobs.conclude(job)
    assert board.told == [("commit-disk0", status) for status in ("running", "concluded", "null")]


def test_cancelling_asks_the_work_and_changes_nothing_itself() -> None:
    board = Board()
    job = make()
    asked: list[bool] = []
    job.cancel = lambda: asked.append(True)
    board.jobs.add(job)
    board.jobs.cancel("commit-disk0")
    assert asked == [True]
    assert board.jobs.query()[0]["status"] == "running"


def test_what_a_job_cannot_do_in_its_state_is_refused_in_qemus_words() -> None:
    board = Board()
    job = board.jobs.add(make())
    with pytest.raises(
        CommandError, match=r"^Job 'commit-disk0' in state 'running' cannot accept command verb 'cancel'$"
    ):
        board.jobs.cancel("commit-disk0")  # it has no way to be cancelled
    with pytest.raises(
        CommandError, match=r"^Job 'commit-disk0' in state 'running' cannot accept command verb 'dismiss'$"
    ):
        board.jobs.dismiss("commit-disk0")
    job.cancel = lambda: pytest.fail("cancelled after its end")
    board.jobs.conclude(job, "error")
    with pytest.raises(CommandError, match="in state 'concluded' cannot accept command verb 'cancel'"):
        board.jobs.cancel("commit-disk0")
    for command in (board.jobs.cancel, board.jobs.dismiss):
        with pytest.raises(CommandError, match=r"^Job not found$"):
            command("commit-disk1")


def test_a_new_job_takes_the_place_of_the_failed_one_of_its_id() -> None:
    board = Board()
    board.jobs.conclude(board.jobs.add(make()), "failed")
    board.jobs.add(make())
    (shown,) = board.jobs.query()
    assert shown["status"] == "running"
    assert "error" not in shown


def test_the_end_of_a_job_does_not_take_its_successor_off_the_list() -> None:
    board = Board()
    former = board.jobs.add(make())
    board.jobs.add(make())
    board.jobs.conclude(former)
    assert [shown["status"] for shown in board.jobs.query()] == ["running"]
