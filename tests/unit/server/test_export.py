# SPDX-License-Identifier: BSD-3-Clause
"""export.py: what a request does inside the gate at a time."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest

from replication.disk.face import Extent
from replication.errors import DiskError
from replication.order.gate import Gate
from replication.order.standstill import Standstill
from replication.passing import Passage
from replication.server.export import ZERO_MAX, Export, FollowingExport, PassedExport, within
from replication.side import Face
from waiting import DEADLINE_S, wait_until

SIZE = 1 << 40
MIB = 1 << 20


class Node:
    """As much of a node as an export needs; notes what its face is asked."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.admission = Mock(still=Standstill())
        self.side = Mock()
        self.asked: list[tuple[Any, ...]] = []
        self.faces = {
            "disk": Face(
                "",
                lambda: SIZE,
                lambda *arguments: self.note("read", *arguments),
                lambda *arguments: self.note("write", *arguments),
                lambda *arguments: self.note("zero", *arguments),
                lambda: self.note("flush"),
                self.extents,
            )
        }

    def note(self, *what: Any) -> None:
        self.asked.append((self.gate.passed, *what))

    def extents(self, offset: int, length: int, count: int) -> list[Extent]:
        self.note("extents")
        return [Extent(offset, count, False, False)]


@pytest.mark.parametrize("fua", [False, True], ids=["", "fua"])
@pytest.mark.parametrize("offset", [0, 1, ZERO_MAX - 4096, 3 * MIB])
@pytest.mark.parametrize("length", [1, ZERO_MAX, ZERO_MAX + 1, 64 * MIB, (4 << 30) - 4096])
def test_zeroes_are_made_in_steps_each_with_the_gate_of_its_own(offset: int, length: int, fua: bool) -> None:
    node = Node()
    Export(node, "disk").zero(offset, length, True, fua)  # type: ignore[arg-type]
    steps = [what[2:] for what in node.asked if what[1] == "zero"]
    assert [what[0] for what in node.asked] == list(range(1, len(node.asked) + 1)), "each has entered by itself"
    assert node.side.admit.call_count == len(steps), "and was let in by itself"
    at = offset
    for start, size, may_trim, forced in steps:
        assert (start, may_trim) == (at, True)
        assert 0 < size <= ZERO_MAX
        assert forced is (fua and length <= ZERO_MAX)
        at += size
        assert at % ZERO_MAX == 0 or at == offset + length, "no block is cut in two"
    assert at == offset + length
    assert (node.asked[-1][1:] == ("flush",)) is (fua and length > ZERO_MAX), "one flush covers all steps"


def test_who_asks_for_one_extent_gets_one() -> None:
    export = Export(Node(), "disk")  # type: ignore[arg-type]
    assert export.extents(0, SIZE, True)[0].length == 1
    assert export.extents(0, SIZE)[0].length == 1024


GIB = 1 << 30


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], []),
        ([(100, 50)], [(100, 50)]),
        ([(100, 20), (120, 30)], [(100, 20), (120, 30)]),
        ([(100, 51)], [(100, 50)]),
        ([(0, 8 * GIB)], [(100, 50)]),
        ([(0, 120), (120, 8 * GIB)], [(100, 20), (120, 30)]),
        ([(100, 50), (150, GIB)], [(100, 50)]),
        ([(0, 100), (100, 10)], [(100, 10)]),
        ([(99, 51)], [(100, 50)]),
    ],
)
def test_extents_say_nothing_of_what_is_outside_the_request(
    found: list[tuple[int, int]], said: list[tuple[int, int]]
) -> None:
    extents = [Extent(offset, length, True, False) for offset, length in found]
    assert within(extents, 100, 50) == [Extent(offset, length, True, False) for offset, length in said]


def test_an_export_clips_what_its_face_says() -> None:
    node = Node()
    face = node.faces["disk"]
    node.faces["disk"] = face._replace(extents=lambda *_: [Extent(0, SIZE, True, True)])
    assert Export(node, "disk").extents(4096, 4 * GIB - 4096) == [  # type: ignore[arg-type]
        Extent(4096, 4 * GIB - 4096, True, True)
    ]


REQUESTS: dict[str, Callable[[Export], object]] = {
    "read": lambda export: export.read(memoryview(bytearray(1)), 0),
    "write": lambda export: export.write(memoryview(b"x"), 0, False),
    "zero": lambda export: export.zero(0, 2 * ZERO_MAX, True, False),
    "flush": lambda export: export.flush(),
    "extents": lambda export: export.extents(0, 1),
}


@pytest.mark.parametrize("writes_only", [False, True], ids=["all", "writes-only"])
@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_stands_still_outside_the_gate(what: str, writes_only: bool) -> None:
    node = Node()
    still = node.admission.still
    still.begin("because", fails=False, writes_only=writes_only)
    request = threading.Thread(target=REQUESTS[what], args=(Export(node, "disk"),), daemon=True)  # type: ignore[arg-type]
    request.start()
    if writes_only and what in ("read", "extents"):
        request.join(DEADLINE_S)
        assert not request.is_alive()
        return
    wait_until(lambda: still.waiting, "it stands still")
    with node.gate.closed(0.0):
        assert node.asked == []
    still.over()
    request.join(DEADLINE_S)
    assert not request.is_alive()
    assert what == "extents" or node.asked[0][1] == what


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("why", ["turned-away", "gone"])
def test_what_stood_still_is_not_done_for_another_role_or_another_guest(what: str, why: str) -> None:
    """The disk behind the export is another one, or another client uses it meanwhile."""
    node = Node()
    still = node.admission.still
    export = Export(node, "disk")  # type: ignore[arg-type]
    gone = threading.Event()
    export.gone = gone.is_set
    still.begin("because", fails=False)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(REQUESTS[what], export)
        wait_until(lambda: still.waiting, "it stands still")
        if why == "gone":
            gone.set()
        else:
            still.turn_away("the node has been made a secondary")
        still.over()
        with pytest.raises(DiskError, match=r"stood still, and has gone|been made a secondary"):
            request.result(DEADLINE_S)
    assert node.asked == []
    if why == "gone":
        # Nor is what nbdkit reads from its socket only now.
        for late in REQUESTS.values():
            with pytest.raises(DiskError, match="its client has gone"):
                late(export)
        assert node.asked == []
    else:
        REQUESTS[what](export)  # of another guest's time
    assert node.gate.idle


@pytest.mark.parametrize("what", REQUESTS)
def test_what_a_slow_disk_answers_after_the_lease_is_not_answered(what: str) -> None:
    """Another guest may have changed since what was read."""
    node, now = Node(), 0.0
    still, note = Standstill(lambda: now), node.note
    node.admission.still = still
    still.lease(10.0)

    def slow(*what: Any) -> None:
        nonlocal now
        note(*what)
        now = max(now, 11.0)

    node.note = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(REQUESTS[what], Export(node, "disk"))  # type: ignore[arg-type]
        wait_until(lambda: still.waiting or request.done(), "its answer is held")
        assert not request.done()
        still.lease(20.0)
        request.result(DEADLINE_S)


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("owner", ["disk", None], ids=["owner", "no-owner"])
def test_what_is_passed_on_fails_only_where_the_disk_is_owned(what: str, owner: str | None) -> None:
    """Whoever has passed it on asks the next owner, if there is another one by now."""
    node = Node()
    still = node.admission.still
    node.side.owned_by.return_value = owner
    export = PassedExport(node, "disk", ("proof", "disk0"), Passage())  # type: ignore[arg-type]
    still.begin("because", fails=False)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(REQUESTS[what], export)
        wait_until(lambda: still.waiting, "it stands still")
        still.turn_away("the node has been made a secondary")
        with pytest.raises(DiskError, match="made a secondary") as raised:
            request.result(DEADLINE_S)
    assert raised.value.errno == (errno.EIO if owner else errno.ESHUTDOWN)
    assert node.asked == []


@pytest.mark.parametrize("writes_only", [True, False])
@pytest.mark.parametrize("what", ["write", "zero", "flush"])
def test_what_was_done_when_the_guest_began_to_stand_still_is_not_answered(what: str, writes_only: bool) -> None:
    """The link is lost, or the node learns that it is outdated, while the request is at its disk."""
    node = Node()
    still, note = node.admission.still, node.note

    def lost(*what: Any) -> None:
        note(*what)
        if len(node.asked) == 1:
            still.begin("because", fails=False, writes_only=writes_only)

    node.note = lost  # type: ignore[method-assign]
    request = threading.Thread(target=REQUESTS[what], args=(Export(node, "disk"),), daemon=True)  # type: ignore[arg-type]
    request.start()
    wait_until(lambda: still.waiting, "its answer is held")
    assert len(node.asked) == 1
    still.over()
    request.join(DEADLINE_S)
    assert not request.is_alive()
    assert len(node.asked) == (2 if what == "zero" else 1), "nothing is done twice"


@pytest.mark.parametrize(("owners", "size"), [(None, SIZE), (SIZE - 512, SIZE - 512)], ids=["alike", "here first"])
def test_a_guest_whose_requests_are_passed_on_has_a_disk_of_the_owners_size(owners: int | None, size: int) -> None:
    node = Node()
    node.side.size_of_owner = lambda _export: owners
    assert FollowingExport(node, "disk", Mock()).size == size  # type: ignore[arg-type]
