# SPDX-License-Identifier: BSD-3-Clause
"""passing.py: to whom a request goes, for how long it waits, and what becomes of one whose connection is lost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from replication import passing
from replication.acquaintance import answer, asks, boot_of, question
from replication.errors import CommandError, DiskError, Elsewhere
from replication.options import OptionParser, Options
from replication.passing import Passage, Passer, Passing, Patience
from replication.stage import Mode
from waiting import DEADLINE_S, wait_until


class Connection:
    """As much of one as a passer needs. `answer` is called for each request, after it was sent."""

    def __init__(self, boot: str = "1", answer: Callable[[], None] = lambda: None) -> None:
        self.boot = boot
        self.description = ""
        self.read_only = False
        self.uri = "nbd://owner"
        self.dead = False
        self.owing_s: float | None = None
        self.answer = answer

    def issue(self, *_request: object) -> None:
        if self.dead:
            raise DiskError("the connection is lost", errno.ENOTCONN)

    def wait(self, _request: object) -> None:
        self.answer()

    def wait_for_answers(self, _seconds: float) -> None:
        pass

    def fail(self, _cause: str) -> None:
        self.dead = True

    def close(self) -> None:
        self.dead = True


class Owner:
    """Connects a passer, and says which session there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.token: str | None = "first"
        self.left_well = False
        self.connections: list[Connection] = []
        self.next: Callable[[], Connection] = Connection
        parser = OptionParser()
        given = {"role": "auto", "disk": "/d", "top-id": "guest", "state": "/s", "peer": "nbd://b", "follow-owner": "1"}
        for key, value in given.items():
            parser.add(key, value)
        monkeypatch.setattr(Passing, "_connect", self.connect)
        self.passing = Passing(parser.finish(), lambda: self.token, lambda: self.left_well)

    def connect(self, _uri: str, _options: object, _name: str, token: str) -> Any:
        made = self.next()
        made.description = made.description or answer(token, made.boot)
        self.connections.append(made)
        return made

    def run(self, request: Callable[[Passer, Any], None], patience: Patience | None = None, gone: bool = False) -> bool:
        return self.passing.run("guest", request, patience or Patience(), lambda: gone)

    def insist(self, request: Callable[[Passer, Any], None]) -> None:
        """As an export does, on a node that does not become the owner."""
        patience = Patience()
        while not self.run(request, patience):
            pass


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Owner:
    return Owner(monkeypatch)


def write(passer: Passer, connection: Any) -> None:
    passer.write(connection, memoryview(b"x"), 0, False)


def flush(passer: Passer, connection: Any) -> None:
    passer.flush(connection)


def refuse(number: int) -> Callable[[], None]:
    def answer() -> None:
        raise DiskError("the server says no", number)

    return answer


# -- to whom ---------------------------------------------------------------------------------------------------


def test_one_connection_for_a_session(owner: Owner) -> None:
    assert owner.run(write)
    assert owner.run(write)
    owner.token = "second"
    assert owner.run(write)
    assert [connection.dead for connection in owner.connections] == [True, False]


def test_a_connection_of_a_session_that_is_over_is_given_up(owner: Owner) -> None:
    assert owner.run(write)
    owner.passing.look()
    assert not owner.connections[0].dead
    owner.token = None
    owner.passing.look()
    assert owner.connections[0].dead
    assert not owner.run(write)


def test_a_connection_whose_other_end_acknowledges_nothing_is_given_up(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall has forgotten it, say: the link is another one. What is owed after a long silence is not owed long."""
    clock = [1000.0]
    assert owner.run(write)
    connection = owner.connections[0]
    monkeypatch.setattr(passing.time, "monotonic", lambda: clock[0])

    def look(after_s: float, owing_s: float | None) -> bool:
        clock[0] += after_s
        connection.owing_s = owing_s
        owner.passing.look()
        return connection.dead

    assert not look(0.0, 900.0)
    assert not look(0.5, None), "it has answered"
    assert not look(100.0, 99.0)
    assert not look(passing.SILENT_S, 99.0 + passing.SILENT_S)
    assert not look(1.0, 0.5), "it has answered that"
    assert not look(passing.SILENT_S - 0.6, passing.SILENT_S - 0.1)
    assert look(0.5, passing.SILENT_S + 0.4)


@pytest.mark.parametrize("number", [errno.ESHUTDOWN, errno.ENOTCONN])
def test_what_nobody_has_done_is_no_failure(owner: Owner, number: int) -> None:
    owner.next = lambda: Connection(answer=refuse(number))
    assert not owner.run(write)


def test_a_connection_over_which_nothing_is_done_is_given_up(owner: Owner) -> None:
    """At the owner another one has taken its place."""
    owner.next = lambda: Connection(answer=refuse(errno.ESHUTDOWN))
    assert not owner.run(write)
    assert "says no" in owner.passing.query()["obstacle"]
    owner.next = Connection
    assert owner.run(write)
    assert [connection.dead for connection in owner.connections] == [True, False]
    assert owner.passing.query()["obstacle"] is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_the_owner_could_not_do_is_one(owner: Owner, number: int) -> None:
    owner.next = lambda: Connection(answer=refuse(number))
    with pytest.raises(DiskError) as raised:
        owner.run(write)
    assert raised.value.errno == number


def test_each_shows_the_other_that_it_has_the_token() -> None:
    token = "9b" * 16
    assert asks(question(token), token)
    assert boot_of(answer(token, "a, b"), token) == "a, b"
    assert token not in question(token) + answer(token, "1")
    for name in ("", token, question("other"), "\udcff"):
        assert not asks(name, token)
        assert boot_of(name, token) is None
    assert not asks(question(""), "")
    assert boot_of(answer("other", "1"), token) is None
    assert boot_of(answer(token, "1").replace("boot 1", "boot 2"), token) is None


def test_what_is_asked_for_is_in_no_text(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    class Refusing:
        def __init__(self, uri: str, export: str, *_more: object) -> None:
            names.append(export)
            raise DiskError(f"the server at {uri} refuses the export '{export}': Operation not permitted")

    monkeypatch.undo()
    monkeypatch.setattr(passing, "Connection", Refusing)
    connect = partial(Passing._connect, "nbd://b", Options(Mode.SECONDARY, [], "/s", None), "disk")
    monkeypatch.setattr(owner.passing._passers["guest"], "_connect", connect)
    assert not owner.passing.run("guest", write, Patience(), lambda: False)
    obstacle = owner.passing.query()["obstacle"]
    assert "refuses the export '.owner:...:" in obstacle
    assert question("first") not in obstacle
    assert question("first") in names[0]


@pytest.mark.parametrize("what", ["the guest's disk", answer("another session", "1")])
def test_who_serves_something_else_is_no_owner(owner: Owner, what: str) -> None:
    def other() -> Connection:
        found = Connection()
        found.description = what
        return found

    owner.next = other
    assert not owner.run(write)
    assert owner.connections[0].dead


# -- how long --------------------------------------------------------------------------------------------------


def test_without_an_owner_a_request_fails_in_the_end(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "PATIENCE_S", 0.3)
    owner.token = None
    with pytest.raises(DiskError, match=r"no owner for 0\.3 s: this node is in no pair"):
        owner.insist(write)


def test_an_owner_that_has_left_in_good_order_is_waited_for_without_end(owner: Owner) -> None:
    """A switch-over was cut off half-way, perhaps: nothing is lost, and somebody goes on with it."""
    owner.token, owner.left_well, patience = None, True, Patience()
    assert not owner.run(write, patience)
    assert patience.left_s == passing.PATIENCE_S
    assert owner.passing.query()["owner-left"]
    owner.left_well = False  # one has come since
    assert not owner.run(write, patience)
    assert patience.left_s < passing.PATIENCE_S


def test_the_time_for_which_an_owner_has_it_does_not_count(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own guest may stand still for as long."""
    clock = [0.0]
    monkeypatch.setattr(passing.time, "monotonic", lambda: clock[0])

    def late(_passer: Passer, connection: Any) -> None:
        clock[0] += 2 * passing.PATIENCE_S
        connection.fail("lost")
        raise DiskError("lost")

    patience = Patience()
    assert not owner.run(late, patience)
    assert patience.left_s == passing.PATIENCE_S


def test_what_a_guest_asked_for_that_has_gone_is_not_passed_on(owner: Owner) -> None:
    patience = Patience()
    owner.token = None
    assert not owner.run(write, patience, gone=True)
    owner.token = "first"
    with pytest.raises(DiskError, match="has gone"):
        owner.run(write, patience, gone=True)
    assert not owner.connections


def test_what_a_guest_asked_for_that_has_gone_while_the_owner_was_connected_to_is_not_passed_on(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another guest is there by then, perhaps, whose requests go over that connection."""
    clock = [0.0]
    monkeypatch.setattr(passing.time, "monotonic", lambda: clock[0])

    def slow() -> Connection:
        clock[0] += 1
        return Connection(answer=lambda: pytest.fail("it was passed on"))

    owner.next = slow
    with pytest.raises(DiskError, match="has gone"):
        owner.run(write, gone=True)
    assert not owner.passing.busy


@pytest.mark.parametrize("how", ["look", "another guest"])
def test_what_the_owner_has_of_a_guest_that_has_gone_is_given_up(owner: Owner, how: str) -> None:
    """It stands still there. What another guest has there is done again."""
    gone, sent = threading.Event(), threading.Semaphore(0)

    def answer() -> None:
        sent.release()
        wait_until(lambda: owner.connections[0].dead, "the connection is given up")
        raise DiskError("lost", errno.ENOTCONN)

    owner.next = lambda: Connection(answer=answer)
    with ThreadPoolExecutor(2) as pool:
        mine = pool.submit(owner.passing.run, "guest", write, Patience(), gone.is_set)
        others = pool.submit(owner.insist, write)
        for _ in range(2):
            assert sent.acquire(timeout=DEADLINE_S)
        owner.passing.look()
        assert not owner.connections[0].dead
        owner.next = Connection
        gone.set()
        if how == "look":
            owner.passing.look()
        else:
            owner.passing.attend(Attending())
        assert not mine.result(DEADLINE_S)
        others.result(DEADLINE_S)
    assert len(owner.connections) == 2


class Attending:
    """A guest's connection."""

    def end(self, why: str) -> None:
        raise AssertionError(why)


def test_the_end_of_the_process_ends_what_waits(owner: Owner) -> None:
    owner.token = None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(owner.insist, write)
        wait_until(lambda: owner.passing.waits, "it waits")
        owner.passing.end()
        with pytest.raises(DiskError) as raised:
            waiting.result(DEADLINE_S)
    assert raised.value.errno == errno.ESHUTDOWN


def test_a_hold_waits_for_what_the_owner_has(owner: Owner) -> None:
    sent, answered = threading.Event(), threading.Event()

    def answer() -> None:
        sent.set()
        assert answered.wait(DEADLINE_S)

    owner.next = lambda: Connection(answer=answer)
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(owner.run, write)
        assert sent.wait(DEADLINE_S)
        with pytest.raises(CommandError, match="nothing is held"):
            owner.passing.hold(0.05)
        assert not owner.passing.query()["held"]
        holding = pool.submit(owner.passing.hold, DEADLINE_S)
        wait_until(lambda: owner.passing.query()["held"], "it is held")
        assert not owner.run(write), "nothing new is passed on"
        answered.set()
        assert request.result(DEADLINE_S)
        holding.result(DEADLINE_S)
    assert not owner.run(write)
    owner.passing.release()
    assert owner.run(write)


# -- what is lost ----------------------------------------------------------------------------------------------


def test_a_flush_tells_once_what_a_new_boot_of_the_owners_host_may_have_lost(owner: Owner) -> None:
    assert owner.run(write)
    owner.next, owner.token = lambda: Connection(boot="2"), "second"
    with pytest.raises(DiskError, match="started anew"):
        owner.insist(flush)
    assert owner.run(flush)


@pytest.mark.parametrize("boot", ["1", "2"])
def test_what_was_flushed_is_not_lost(owner: Owner, boot: str) -> None:
    assert owner.run(write)
    assert owner.run(flush)
    owner.next, owner.token = lambda: Connection(boot=boot), "second"
    assert owner.run(flush)


def test_a_process_of_the_same_boot_has_lost_nothing(owner: Owner) -> None:
    assert owner.run(write)
    owner.token = "second"
    assert owner.run(flush)


def test_what_an_owner_had_unflushed_is_forgotten_with_its_ownership(owner: Owner) -> None:
    """The disk has been here meanwhile, and is flushed."""
    assert owner.run(write)
    owner.passing.turn(None)
    owner.next, owner.token = lambda: Connection(boot="2"), "second"
    assert owner.run(flush)
    owner.next, owner.token = lambda: Connection(boot="3"), "third"
    assert owner.run(flush), "nothing was written in the boot before"


# -- on the owner ----------------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may take their time to end."""
    monkeypatch.setattr(passing, "ENDING_S", DEADLINE_S)


@pytest.mark.usefixtures("patient")
def test_a_connection_takes_the_place_of_another_when_its_requests_have_ended() -> None:
    passage, first, second = Passage(), object(), object()
    passage.take_over(first)
    passage.begin(first)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(passage.take_over, second)
        wait_until(lambda: passage._current is second, "the second one has come")
        with pytest.raises(DiskError, match="taken the place"):
            passage.begin(first)
        assert not coming.done()
        passage.end(first)
        coming.result(DEADLINE_S)
    passage.begin(second)
    passage.end(second)


@pytest.mark.usefixtures("patient")
def test_a_third_connection_waits_for_requests_of_the_first() -> None:
    """The second one has none, and may have gone while it waited."""
    passage, first, second, third = Passage(), object(), object(), object()
    passage.take_over(first)
    passage.begin(first)
    with ThreadPoolExecutor(2) as pool:
        coming = pool.submit(passage.take_over, second)
        wait_until(lambda: passage._current is second, "the second one has come")
        last = pool.submit(passage.take_over, third)
        with pytest.raises(DiskError, match="taken the place"):
            coming.result(DEADLINE_S)
        assert not last.done()
        passage.end(first)
        last.result(DEADLINE_S)


def test_requests_that_do_not_end_keep_the_next_connection_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "ENDING_S", 0.05)
    passage, first = Passage(), object()
    passage.take_over(first)
    passage.begin(first)
    with pytest.raises(DiskError) as raised:
        passage.take_over(object())
    assert raised.value.errno == errno.ESHUTDOWN
    with pytest.raises(DiskError):
        passage.begin(first)


def test_elsewhere_stays_elsewhere() -> None:
    assert isinstance(Elsewhere("there").again(), Elsewhere)
