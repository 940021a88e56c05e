# SPDX-License-Identifier: BSD-3-Clause
"""guests.py: who is told from whom, and for how long."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from replication.errors import Refusal
from replication.record.guests import EVERYBODY, LOCAL, NOBODY, Guests, guest_of, lives, of_this_boot, same, together
from replication.record.state import Record
from replication.stage import Mode


class Saving:
    """What saves a record."""

    def __init__(self) -> None:
        self.record = Record(Mode.SECONDARY)
        self.saved: list[list[str]] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.guests = Guests(self.record, self.save)

    def save(self) -> None:
        self.saved.append(list(self.record.guests))
        self.meanwhile()


@pytest.fixture
def saving() -> Saving:
    return Saving()


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ("7.1", "7.1", True),
        ("7.1", "7.2", False),
        ("7.1", "8.1", False),
        ("7", "7.2", True),
        ("7.1", "7", True),
        (NOBODY, NOBODY, True),
        ("7.1", NOBODY, False),
        ("7.1", EVERYBODY, True),
        (NOBODY, EVERYBODY, True),
    ],
)
def test_who_may_be_one_guest(one: str, other: str, found: bool) -> None:
    assert same(one, other) is found


def test_a_process_is_there_until_it_has_ended() -> None:
    mine = guest_of(os.getpid())
    assert mine.startswith(f"{os.getpid()}.")
    assert lives(mine)
    assert lives(str(os.getpid()))
    assert not lives(f"{os.getpid()}.1"), "another one has its number"
    assert lives("1"), "another user's"
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert not lives(str(process.pid))


def test_who_cannot_be_told() -> None:
    assert (guest_of(None), guest_of(0)) == (NOBODY, LOCAL)
    assert lives(NOBODY)
    assert lives(LOCAL)
    assert of_this_boot(["1.1", NOBODY, LOCAL, EVERYBODY], False) == [NOBODY, EVERYBODY]
    assert of_this_boot(["1.1", NOBODY], True) == ["1.1", NOBODY]


def test_more_than_there_is_room_for_is_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replication.record.guests.lives", lambda _guest: True)
    many = [f"{number}.1" for number in range(32)]
    assert together(many, many) == sorted(many)
    assert together(many, ["40.1"]) == [EVERYBODY]
    assert together([EVERYBODY], ["40.1"]) == [EVERYBODY]


def test_whoever_was_noted_is_over_until_a_word(saving: Saving) -> None:
    guests, mine = saving.guests, os.getpid()
    name = guests.note(mine)
    guests.note(mine)
    assert saving.saved == [[name]], "once"
    guests.end()
    with pytest.raises(Refusal):
        guests.note(mine)
    guests.note(None)
    guests.end()
    with pytest.raises(Refusal):
        guests.note(None)
    assert guests.forgive() == 2
    guests.note(mine)
    guests.note(None)
    assert not guests.forgive()


def test_what_comes_to_nothing_ends_nobody(saving: Saving) -> None:
    guests = saving.guests
    name = guests.note(os.getpid())
    former = guests.end()
    guests.note(None)
    guests.take_back(former)
    assert (saving.record.guests, saving.record.guests_over) == (sorted([name, NOBODY]), [])


def test_a_guest_that_comes_while_all_are_ended_is_over(saving: Saving) -> None:
    saving.meanwhile = saving.guests.end
    name = saving.guests.note(os.getpid())
    with pytest.raises(Refusal):
        saving.guests.check(name)


def test_a_former_owner_s_guests_are_over_also_one_that_has_come_since_its_record_was_kept(saving: Saving) -> None:
    kept = Record(Mode.PRIMARY)
    name = saving.guests.note(os.getpid())
    saving.guests.replace(kept, lambda: saving.record.take(kept.as_secondary()))
    assert (saving.record.guests, saving.record.guests_over) == ([], [name])
