# SPDX-License-Identifier: BSD-3-Clause
"""Histories of a secondary: what may happen, how Hypothesis draws it, and how it is replayed against the model.

Everything here is sequential: the next step begins when the one before has been answered. Interleavings are forced
elsewhere (tests/e2e), where each has a name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hypothesis import strategies as st

from content import KIB, pattern
from model.model import CommandRefused, Face, Model, Refused


class System(Protocol):
    """What can be compared with the model: it has the model's methods and raises the same refusals."""

    def read(self, face: Face, disk: int, offset: int, length: int) -> bytes: ...
    def write(self, face: Face, disk: int, offset: int, data: bytes, fua: bool = False) -> None: ...
    def zero(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None: ...
    def trim(self, face: Face, disk: int, offset: int, length: int, fua: bool = False) -> None: ...
    def flush(self, face: Face, disk: int) -> None: ...
    def start(self) -> None: ...
    def checkpoint(self) -> None: ...
    def stop(self) -> None: ...
    def failover(self, wait: bool = True) -> None: ...
    def get_error(self) -> str | None: ...
    def restart(self, kill: bool) -> None: ...


@dataclass(frozen=True)
class Read:
    face: Face
    disk: int
    offset: int
    length: int

    def apply(self, system: System) -> bytes:
        return system.read(self.face, self.disk, self.offset, self.length)


@dataclass(frozen=True)
class Write:
    face: Face
    disk: int
    offset: int
    length: int
    seed: int
    fua: bool = False

    def apply(self, system: System) -> None:
        system.write(self.face, self.disk, self.offset, pattern(self.seed, self.length), self.fua)


@dataclass(frozen=True)
class Zero:
    face: Face
    disk: int
    offset: int
    length: int
    fua: bool = False

    def apply(self, system: System) -> None:
        system.zero(self.face, self.disk, self.offset, self.length, self.fua)


@dataclass(frozen=True)
class Trim:
    face: Face
    disk: int
    offset: int
    length: int
    fua: bool = False

    def apply(self, system: System) -> None:
        system.trim(self.face, self.disk, self.offset, self.length, self.fua)


@dataclass(frozen=True)
class Flush:
    face: Face
    disk: int

    def apply(self, system: System) -> None:
        system.flush(self.face, self.disk)


@dataclass(frozen=True)
class Start:
    def apply(self, system: System) -> None:
        system.start()


@dataclass(frozen=True)
class Checkpoint:
    def apply(self, system: System) -> None:
        system.checkpoint()


@dataclass(frozen=True)
class Stop:
    def apply(self, system: System) -> None:
        system.stop()


@dataclass(frozen=True)
class Failover:
    """Without `wait` the next step meets the commit under way."""

    wait: bool = True

    def apply(self, system: System) -> None:
        system.failover(self.wait)


@dataclass(frozen=True)
class GetError:
    def apply(self, system: System) -> str | None:
        return system.get_error()


@dataclass(frozen=True)
class Restart:
    kill: bool

    def apply(self, system: System) -> None:
        system.restart(self.kill)


Step = Read | Write | Zero | Trim | Flush | Start | Checkpoint | Stop | Failover | GetError | Restart
History = list[Step]


@dataclass(frozen=True)
class Rules:
    """What a system can be asked; everything, unless it has a known defect there."""

    guest_reads_before_start: bool = True
    failover_before_start: bool = True
    planned_stop: bool = True
    target_after_end: bool = True
    commit_under_way: bool = True
    trims: bool = True
    restarts: bool = True


def _ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) on a disk of `size` bytes: mostly around few edges, so that requests meet."""
    edges = {0, 512, 4 * KIB, 8 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, size // 2, size - 4 * KIB, size - 512, size - 1}
    edge = st.sampled_from(sorted(offset for offset in edges if 0 <= offset < size))
    offset = st.one_of(edge, st.builds(lambda a, b: a + b, edge, st.integers(-700, 700)), st.integers(0, size - 1))
    length = st.one_of(
        st.sampled_from((1, 511, 512, 513, 4 * KIB - 1, 4 * KIB, 4 * KIB + 1, 16 * KIB, 64 * KIB, 130 * KIB)),
        st.integers(1, 10_000),
    )

    def inside(offset: int, length: int) -> tuple[int, int]:
        offset = min(max(offset, 0), size - 1)
        return offset, min(length, size - offset)

    return st.builds(inside, offset, length)


def _requests(sizes: Sequence[int], rules: Rules, faces: Sequence[Face], reads: bool = True) -> st.SearchStrategy[Step]:
    """One request to one of `faces`."""

    def on(disk: int, face: Face) -> list[st.SearchStrategy[Step]]:
        ranges = _ranges(sizes[disk])
        seeds = st.integers(1, 1 << 16)
        writes = st.builds(lambda r, s, f: Write(face, disk, *r, seed=s, fua=f), ranges, seeds, st.booleans())
        kinds: list[st.SearchStrategy[Step]] = [
            writes,
            writes,
            st.builds(lambda r, f: Zero(face, disk, *r, fua=f), ranges, st.booleans()),
            st.just(Flush(face, disk)),
        ]
        if reads:
            kinds.append(st.builds(lambda r: Read(face, disk, *r), ranges))
        if rules.trims:
            kinds.append(st.builds(lambda r, f: Trim(face, disk, *r, fua=f), ranges, st.booleans()))
        return kinds

    return st.one_of([kind for face in faces for disk in range(len(sizes)) for kind in on(disk, face)])


@st.composite
def histories(draw: st.DrawFn, sizes: Sequence[int], rules: Rules) -> History:
    """A history of a secondary with disks of `sizes`: before start, replication, and perhaps an end and after it."""
    both = (Face.TARGET, Face.GUEST)
    before: list[st.SearchStrategy[Step]] = [
        _requests(sizes, rules, [Face.TARGET]),
        st.builds(lambda r: Write(Face.GUEST, 0, *r, seed=1), _ranges(sizes[0])),
        st.sampled_from((Checkpoint(), GetError())),
    ]
    if rules.failover_before_start:
        before.append(st.just(Failover()))
    if rules.planned_stop:
        before.append(st.just(Stop()))
    if rules.guest_reads_before_start:
        before.append(st.builds(lambda r: Read(Face.GUEST, 0, *r), _ranges(sizes[0])))
    steps: History = draw(st.lists(st.one_of(before), max_size=4))
    steps.append(Start())

    requests = _requests(sizes, rules, both)
    running = st.one_of(requests, requests, requests, requests, st.sampled_from((Checkpoint(), GetError(), Start())))
    steps += draw(st.lists(running, min_size=2, max_size=25))
    if rules.restarts and draw(st.booleans()):
        where = draw(st.integers(0, len(steps)))
        steps.insert(where, Restart(kill=draw(st.booleans())))

    ends: list[Step] = [Failover(wait=True)]
    if rules.commit_under_way:
        ends.append(Failover(wait=False))
    if rules.planned_stop:
        ends.append(Stop())
    end = draw(st.none() | st.sampled_from(ends))
    if end is None:
        return steps
    steps.append(end)
    late_commands: list[Step] = [Checkpoint(), Start(), Failover()]
    if rules.planned_stop:
        late_commands.append(Stop())
    if rules.commit_under_way:
        late_commands.append(GetError())
    if rules.restarts:
        late_commands.append(Restart(kill=draw(st.booleans())))
    late = st.one_of(
        _requests(sizes, rules, both if rules.target_after_end else [Face.GUEST]), st.sampled_from(late_commands)
    )
    steps += draw(st.lists(late, max_size=8))
    return steps


def outcome(step: Step, system: System) -> object:
    """What a step returns, or its refusal."""
    try:
        return step.apply(system)
    except (Refused, CommandRefused) as refusal:
        return refusal


def difference(expected: bytes, actual: bytes) -> str:
    """Where two arrays of bytes differ first, and how, for a person; empty if they are equal."""
    if expected == actual:
        return ""
    if len(expected) != len(actual):
        return f"{len(expected)} bytes expected, got {len(actual)}"
    places = [offset for offset in range(len(expected)) if expected[offset] != actual[offset]]
    first = places[0]
    return (
        f"{len(places)} bytes differ in {first}..{places[-1]}; at {first} "
        f"{expected[first : first + 8].hex()} expected, got {actual[first : first + 8].hex()}"
    )


def check_equal(expected: bytes, actual: bytes, what: str) -> None:
    """Raise AssertionError, saying where, if `actual` is not `expected`."""
    if where := difference(expected, actual):
        raise AssertionError(f"{what}: {where}")


def replay(history: History, model: Model, system: System, after_each: Callable[[], None] = lambda: None) -> None:
    """Take every step on both and compare the outcomes; raises AssertionError at the first difference."""
    for number, step in enumerate(history):
        expected = outcome(step, model)
        actual = outcome(step, system)
        what = f"step {number}, {step}"
        if isinstance(expected, bytes) and isinstance(actual, bytes):
            check_equal(expected, actual, what)
        elif expected != actual:
            raise AssertionError(f"{what}: {_short(expected)} expected, got {_short(actual)}")
        after_each()


def _short(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)


@functools.cache
def first_content(size: int, seed: int = 1) -> bytes:
    """What a disk of `size` bytes holds at first: data, a hole in the middle, data."""
    third = size // 3
    return pattern(seed, third) + bytes(third) + pattern(seed + 1, size - 2 * third)
