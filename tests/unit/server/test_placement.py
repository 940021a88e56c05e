# SPDX-License-Identifier: BSD-3-Clause
"""placement.py: when threads are put together, where, and that they are let go again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from replication.server import placement
from replication.server.placement import Cores, Load, Pace, Placement, Traffic, better, loads, pace, ranking
from waiting import DEADLINE_S, wait_until

KIB = 1024
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("requests", "mean", "together", "expected"),
    [
        (20_000, 4 * KIB, False, Pace.SHORT),
        (20_000, 4 * KIB, True, Pace.SHORT),
        (3_000, 64 * KIB, False, Pace.SHORT),
        (3_000, 128 * KIB, False, Pace.LARGE),
        (3_000, 128 * KIB, True, Pace.SHORT),
        (3_000, 256 * KIB, False, Pace.LARGE),
        (3_000, 256 * KIB, True, Pace.LARGE),
        (1_000, 1024 * KIB, False, Pace.SLOW),
        (1_000, 1024 * KIB, True, Pace.LARGE),
        (1_000, 4 * KIB, False, Pace.SLOW),
        (1_000, 4 * KIB, True, Pace.SHORT),
        (400, 4 * KIB, True, Pace.SLOW),
        (0, 0, False, Pace.SLOW),
        (0, 0, True, Pace.SLOW),
        (20_000, 0, False, Pace.SHORT),
    ],
)
def test_pace_of_a_second(requests: int, mean: int, together: bool, expected: Pace) -> None:
    before = Traffic(10.0, 7, 9)
    assert pace(Traffic(11.0, 7 + requests, 9 + requests * mean), before, together) is expected


def test_the_rate_is_that_of_the_time_between_two_looks() -> None:
    assert pace(Traffic(0.1, 300, 0), Traffic(0.0, 0, 0), False) is Pace.SHORT
    assert pace(Traffic(1.0, 300, 0), Traffic(0.0, 0, 0), False) is Pace.SLOW


def test_bytes_that_go_back_with_a_change_of_role_are_no_large_requests() -> None:
    assert pace(Traffic(1.0, 5000, 0), Traffic(0.0, 0, 1 << 30), True) is Pace.SHORT


def test_our_own_time_is_taken_off_the_core_that_is_held_alone() -> None:
    before, now = Load(0.0, 0.0, {0: 5.0, 1: 5.0}), Load(2.0, 1.5, {0: 6.75, 1: 5.5})
    assert loads(now, before, 0) == {0: 0.125, 1: 0.25}
    assert loads(now, before, None) == {0: 0.875, 1: 0.25}


def test_a_core_that_was_switched_on_or_off_between_two_looks_has_no_load() -> None:
    assert loads(Load(1.0, 0.0, {0: 1.0, 2: 1.0}), Load(0.0, 0.0, {0: 1.0, 1: 1.0}), 1) == {0: 0.0}


def test_the_idlest_core_comes_first_of_those_that_may_be_used() -> None:
    assert ranking({0: 0.9, 1: 0.5, 2: 0.1, 3: 0.0}, {0, 1, 2, 7}) == [2, 1, 0]


def test_cores_that_are_about_equally_idle_are_chosen_at_random() -> None:
    assert {ranking({0: 0.01, 1: 0.02, 2: 0.9}, {0, 1, 2})[0] for _ in range(200)} == {0, 1}


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        ({0: 0.0, 1: 0.0}, None),
        ({0: 0.2, 1: 0.0}, None),
        ({0: 0.5, 1: 0.0}, 1),
        ({0: 0.5, 1: 0.2}, 1),
        ({0: 0.5, 1: 0.3}, None),
        ({0: 1.0, 1: 1.0}, None),
        ({0: 0.5, 1: 0.4, 2: 0.1}, 2),
        ({1: 0.0}, None),
        ({0: 0.9, 7: 0.0}, None),
    ],
)
def test_when_another_core_is_better_than_core_0(used: dict[int, float], expected: int | None) -> None:
    assert better(used, 0, {0, 1, 2}) == expected


class FakeCores(Cores):
    """A host without threads: cores, who uses them, whose they are."""

    def __init__(self, *busy: float) -> None:
        self.mask: Collection[int] = set(range(len(busy)))
        self.busy = dict(enumerate(busy))
        self.at_s = 0.0
        self.taken: set[int] = set()
        self.put: list[set[int]] = []
        self.error: Exception | None = None
        self._total = dict.fromkeys(self.busy, 0.0)
        self.own_s = 0.0

    def pass_time(self, seconds: float, own: float) -> None:
        """Others use their shares, and our threads `own` of a core: the one they are on, or half of the first two."""
        self.at_s += seconds
        self.own_s += own * seconds
        mine = sorted(self.mask)[:2]
        for core in self._total:
            self._total[core] += seconds * (self.busy[core] + (own / len(mine) if core in mine else 0.0))

    def given(self) -> set[int]:
        return set(self.mask)

    def confine(self, cores: Collection[int]) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.mask = set(cores)
        self.put.append(set(cores))

    def clock(self) -> float:
        return self.at_s

    def load(self) -> Load:
        return Load(self.at_s, self.own_s, dict(self._total))

    def claim(self, core: int) -> socket.socket | None:
        if core in self.taken:
            return None
        self.taken.add(core)
        return Name(self, core)


class Name(socket.socket):
    """A name on a core of FakeCores."""

    def __init__(self, cores: FakeCores, core: int) -> None:
        super().__init__()
        self.cores, self.core = cores, core

    def close(self) -> None:
        self.cores.taken.discard(self.core)
        super().close()


class Host:
    """A Placement on FakeCores, and time that passes by looks."""

    def __init__(self, *busy: float) -> None:
        self.cores = FakeCores(*busy)
        self.said: list[str] = []
        self.requests = self.bytes = 0
        self.placement = Placement(lambda: (self.requests, self.bytes), self.said.append, self.cores)

    def look(self, rate: float = 0.0, mean: int = 4 * KIB, times: int = 1, own: float = 0.0) -> None:
        for _ in range(times):
            requests = int(rate * placement.LOOK_S)
            self.requests += requests
            self.bytes += requests * mean
            self.cores.pass_time(placement.LOOK_S, own)
            if not self.placement._over.is_set():
                self.placement.look()

    def gather(self) -> None:
        self.look(20_000, times=3)
        assert self.placement.core is not None


def test_many_short_requests_bring_the_threads_together_on_the_idlest_core() -> None:
    host = Host(0.5, 0.1, 0.9)
    host.look()
    host.look(20_000)
    assert host.cores.put == [], "one look is not enough"
    host.look(20_000)
    assert host.cores.put == [{1}]
    host.look(20_000, times=100)
    assert host.cores.put == [{1}], "and there they stay"


def test_few_or_large_requests_leave_them_where_they_are() -> None:
    host = Host(0.0, 0.0)
    host.look(times=10)
    host.look(1_000, times=50)
    host.look(3_000, 256 * KIB, times=50)
    for _ in range(20):
        host.look(20_000)
        host.look(20_000, 256 * KIB)
    assert host.cores.put == []


def test_large_requests_let_the_threads_go_at_once() -> None:
    host = Host(0.0, 0.0)
    host.gather()
    host.look(1_000, 1024 * KIB)
    assert len(host.cores.put) == 1
    host.look(1_000, 1024 * KIB)
    assert host.cores.put[1:] == [{0, 1}]
    assert host.cores.taken == set(), "the core is nobody's again"


def test_a_pause_does_not_let_the_threads_go_but_idleness_does() -> None:
    host = Host(0.0, 0.0)
    host.gather()
    for _ in range(5):
        host.look(times=9)
        host.look(20_000)
    assert len(host.cores.put) == 1
    host.look(times=10)
    assert host.cores.put[1:] == [{0, 1}]
    host.gather()


def test_sizes_between_the_two_limits_change_nothing() -> None:
    host = Host(0.0, 0.0)
    host.look(5_000, 128 * KIB, times=20)
    assert host.cores.put == []
    host.gather()
    host.look(5_000, 128 * KIB, times=20)
    assert len(host.cores.put) == 1


def test_a_core_that_another_process_has_is_not_taken_while_there_is_one_more() -> None:
    host = Host(0.0, 0.8, 0.5)
    host.cores.taken = {0}
    host.gather()
    assert host.placement.core == 2
    assert host.cores.taken == {0, 2}


def test_where_all_cores_are_taken_the_idlest_is_shared_and_taken_when_it_is_free() -> None:
    host = Host(0.9, 0.4)
    host.cores.taken = {0, 1}
    host.gather()
    assert host.placement.core == 1
    host.cores.taken.clear()
    host.look(20_000, times=20)
    assert host.cores.taken == {1}


def test_others_that_want_the_core_make_the_threads_move() -> None:
    host = Host(0.0, 0.2, 0.6)
    host.gather()
    host.look(20_000, times=20, own=0.9)
    assert host.placement.core == 0, "our own load is no reason"
    host.cores.busy[0] = 0.5
    host.look(20_000, times=30, own=0.5)
    assert host.cores.put == [{0}, {1}]
    assert host.cores.taken == {1}
    host.look(20_000, times=100, own=0.8)
    assert len(host.cores.put) == 2, "and there they stay"


def test_a_burst_of_others_is_no_reason_to_move() -> None:
    host = Host(0.0, 0.3)
    host.gather()
    for _ in range(10):
        host.cores.busy[0] = 0.7
        host.look(20_000, times=1)
        host.cores.busy[0] = 0.0
        host.look(20_000, times=14)
    assert host.cores.put == [{0}]


def test_two_that_share_a_core_without_seeing_each_others_names_part() -> None:
    """As in two containers; the other's load is on the core that it has, and both see 0.5 there."""
    hosts = [Host(0.0, 0.9), Host(0.0, 0.9)]
    for host in hosts:
        host.cores.taken = {0, 1}
        host.gather()
    assert [host.placement.core for host in hosts] == [0, 0]

    def step() -> bool:
        one, two = (host.placement.core for host in hosts)
        for host, other in zip(hosts, reversed(hosts), strict=True):
            busy = 0.5 if one == two else 0.9
            host.cores.busy = {core: busy if core == other.placement.core else 0.0 for core in (0, 1)}
            host.look(20_000, own=busy)
        return hosts[0].placement.core != hosts[1].placement.core

    # Both may leave at once now and then; that they do so forty times is out of the question.
    steps = 0
    apart = 0
    while apart < 30:
        steps += 1
        assert steps < 2000, "they never part for good"
        apart = apart + 1 if step() else 0


def test_cores_given_meanwhile_are_respected() -> None:
    host = Host(0.0, 0.3, 0.6)
    host.look(times=3)
    host.cores.mask = {1, 2}
    host.gather()
    assert host.placement.core == 1
    host.look(1_000, 1024 * KIB, times=2)
    assert host.cores.put == [{1}, {1, 2}]


def test_a_single_core_given_meanwhile_leaves_nothing_to_do() -> None:
    host = Host(0.0, 0.1)
    host.cores.mask = {1}
    host.look(20_000, times=10)
    assert host.cores.put == []


def test_who_changes_the_cores_of_threads_that_are_together_has_the_last_word() -> None:
    host = Host(0.0, 0.3, 0.6)
    host.gather()
    host.cores.mask = {1, 2}
    host.look(20_000, times=10)
    assert host.cores.taken == set()
    assert host.cores.put == [{0}]
    host.placement.stop()
    assert host.cores.put == [{0}]
    assert "changed from outside" in host.said[-1]


@pytest.mark.parametrize("error", [PermissionError(1, "no"), OSError(22, "no such core"), ValueError("empty")])
def test_an_error_of_the_kernel_ends_it_and_lets_all_threads_go(error: Exception) -> None:
    host = Host(0.0, 0.0)
    host.look(20_000, times=2)
    assert host.cores.put == []
    host.cores.error = error
    host.look(20_000)
    assert host.cores.put == [{0, 1}], "some threads may have been put on the core"
    assert host.cores.taken == set()
    assert [line for line in host.said if str(error) in line] == host.said
    host.look(20_000, times=10)
    assert len(host.cores.put) == 1


def test_stopping_gives_the_cores_back() -> None:
    host = Host(0.0, 0.0)
    host.gather()
    host.placement.stop()
    assert host.cores.put[1:] == [{0, 1}]
    host.placement.stop()
    assert len(host.cores.put) == 2


def test_with_one_core_no_thread_is_started() -> None:
    host = Host(0.0)
    host.placement.start()
    assert "placement" not in {thread.name for thread in threading.enumerate()}


# -- the kernel ------------------------------------------------------------------------------------------------


@pytest.fixture
def many() -> Iterator[set[int]]:
    """The cores of this process, at least two; it gets them back."""
    given = os.sched_getaffinity(0)
    if len(given) < 2:
        pytest.skip("needs two cores")
    yield given
    Cores().confine(given)


def test_every_thread_is_confined_and_so_is_a_later_one(many: set[int]) -> None:
    told: list[set[int]] = []
    threads = []
    go = threading.Event()
    core = max(many)

    def run() -> None:
        go.wait(DEADLINE_S)
        told.append(os.sched_getaffinity(0))

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    Cores().confine({core})
    threads.append(threading.Thread(target=run))
    threads[-1].start()
    go.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert told == [{core}] * 6
    assert Cores().given() == {core}


def test_threads_that_end_meanwhile_are_no_error(many: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    number = ended.native_id
    ended.join()
    listed = os.listdir("/proc/self/task")
    wait_until(lambda: not Path(f"/proc/self/task/{number}").exists(), "the thread has gone")
    monkeypatch.setattr(os, "listdir", lambda _: [str(number), *listed])
    Cores().confine({min(many)})
    assert Cores().given() == {min(many)}


def test_the_load_of_every_core_is_read(many: set[int]) -> None:
    before = Cores().load()
    assert many <= before.busy_s.keys()
    Cores().confine({min(many)})

    def spent() -> bool:
        now = Cores().load()
        return now.own_s - before.own_s > 0.1 and now.busy_s[min(many)] - before.busy_s[min(many)] > 0.05

    wait_until(spent, "our own time shows on the core that we use")


def test_a_name_on_a_core_is_one_processs_alone_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_NAME", f"\0nbdkit-replication.test{os.getpid()}.core")
    code = (
        "import sys; from replication.server import placement; placement._NAME = sys.argv[1].replace('@', chr(0))\n"
        "name = placement.Cores().claim(3); print(name is not None, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, placement._NAME.replace("\0", "@")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert Cores().claim(3) is None
        four = Cores().claim(4)
        assert four is not None
        four.close()
        other.kill()
    three = Cores().claim(3)
    assert three is not None
    assert Cores().claim(3) is None
    three.close()
