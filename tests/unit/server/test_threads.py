# SPDX-License-Identifier: BSD-3-Clause
"""threads.py: the state that Python keeps for a thread which it has not started.

Such a thread is made here as nbdkit makes its own, with pthread_create. It calls Python several times, each time from
outside: it runs getw(3) on a stream that asks Python for every byte (fopencookie(3)).
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

import pytest

from replication.server import threads
from replication.server.threads import ThreadStates
from waiting import DEADLINE_S, begin, wait_until

CALLS = 4
"""getw reads an int."""

_libc = ctypes.CDLL(None, use_errno=True)
_Read = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Functions(ctypes.Structure):
    """cookie_io_functions_t."""

    _fields_ = (("read", _Read), ("write", ctypes.c_void_p), ("seek", ctypes.c_void_p), ("close", ctypes.c_void_p))


_libc.fopencookie.restype = ctypes.c_void_p
_libc.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Functions)
_libc.fclose.argtypes = (ctypes.c_void_p,)
_libc.pthread_create.argtypes = (ctypes.POINTER(ctypes.c_ulong), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_libc.pthread_join.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
_getw = ctypes.cast(_libc.getw, ctypes.c_void_p)

_python = ctypes.pythonapi
for _function in (_python.PyInterpreterState_Get, _python.PyInterpreterState_ThreadHead, _python.PyThreadState_Next):
    _function.restype = ctypes.c_void_p
_python.PyInterpreterState_ThreadHead.argtypes = (ctypes.c_void_p,)
_python.PyThreadState_Next.argtypes = (ctypes.c_void_p,)


def states() -> set[int]:
    """The states of all threads."""
    found = set()
    state = _python.PyInterpreterState_ThreadHead(_python.PyInterpreterState_Get())
    while state:
        found.add(state)
        state = _python.PyThreadState_Next(state)
    return found


def own() -> int:
    """The calling thread's state."""
    return int(threads._api.PyThreadState_Get())


class Foreign:
    """A thread that Python has not started, which makes each of the calls from outside."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        assert len(calls) <= CALLS
        self.seen: list[int] = []
        """The state in each call."""
        self._thread = 0
        self._errors: list[BaseException] = []
        self._calls = list(calls)
        # Kept here, or it would be gone while the thread calls it.
        self._read = _Read(self._called)

    def _called(self, _cookie: int, buffer: int, _size: int) -> int:
        try:
            self._thread = threading.get_native_id()
            self.seen.append(own())
            if self._calls:
                self._calls.pop(0)()
        except BaseException as error:  # noqa: BLE001 (nothing goes through getw)
            self._errors.append(error)
        ctypes.memset(buffer, 1, 1)
        return 1

    def run(self) -> list[int]:
        """Until the thread has ended; `seen`."""
        stream = _libc.fopencookie(None, b"r", _Functions(self._read, None, None, None))
        assert stream
        thread = ctypes.c_ulong()
        assert _libc.pthread_create(ctypes.byref(thread), None, _getw, stream) == 0
        assert _libc.pthread_join(thread, None) == 0
        _libc.fclose(stream)
        assert not self._errors, self._errors
        assert len(self.seen) == CALLS
        # The kernel lets a thread be joined a moment before it is gone.
        task = f"/proc/self/task/{self._thread}"
        wait_until(lambda: not os.path.exists(task), "the thread is gone")
        return self.seen


@pytest.fixture(autouse=True)
def _no_state_is_left() -> None:
    """A state that another test's thread has left would be counted here."""
    assert not threads._here.kept
    assert not threads._left


def test_a_thread_that_is_not_kept_leaves_no_state() -> None:
    """What the others rely on: nothing but `keep` keeps one."""
    before = states()
    Foreign().run()
    assert states() == before


def test_a_kept_state_serves_all_requests_of_its_thread_and_is_kept_once() -> None:
    before, kept = states(), ThreadStates()
    foreign = Foreign(*[kept.keep] * CALLS)
    seen = foreign.run()
    assert len(set(seen)) == 1
    assert states() - before == {seen[0]}, "it outlives its thread"
    assert [state for _, state in kept._states] == [seen[0]]
    kept.let_go()
    assert states() == before
    kept.let_go()  # nothing is left to let go
    assert states() == before


def test_keeping_twice_in_one_request_is_keeping_once() -> None:
    before, kept = states(), ThreadStates()

    def keep_twice() -> None:
        kept.keep()
        kept.keep()

    Foreign(keep_twice).run()
    assert len(kept._states) == len(states() - before) == 1
    kept.let_go()
    assert states() == before


def test_the_states_of_many_threads_that_have_ended_are_let_go_together() -> None:
    before, kept = states(), ThreadStates()
    for _ in range(16):
        Foreign(*[kept.keep] * CALLS).run()
    assert len(states() - before) == len(kept._states) == 16
    kept.let_go()
    assert states() == before


def test_a_client_lets_go_of_its_own_threads_only() -> None:
    before, leaving, staying = states(), ThreadStates(), ThreadStates()
    Foreign(leaving.keep).run()
    (stays,) = set(Foreign(*[staying.keep] * CALLS).run())
    leaving.let_go()
    assert states() - before == {stays}
    staying.let_go()
    assert states() == before


def test_a_thread_that_closes_for_itself_lets_go_of_its_own_state() -> None:
    """As with `-t 1`: one thread serves the requests and then closes. The state is gone with that call, not sooner."""
    before, kept = states(), ThreadStates()
    within: list[bool] = []

    def close() -> None:
        kept.let_go()
        within.append(own() in states())
        assert kept._states == []

    foreign = Foreign(kept.keep, kept.keep, kept.keep, close)
    assert len(set(foreign.run())) == 1
    assert within == [True]
    assert states() == before


def test_a_thread_that_has_closed_for_one_client_may_serve_the_next() -> None:
    before, first, second = states(), ThreadStates(), ThreadStates()

    def next_client() -> None:
        first.let_go()

    seen = Foreign(first.keep, next_client, second.keep, second.let_go).run()
    assert (seen[0], seen[2]) == (seen[1], seen[3])
    assert states() == before
    assert (first._states, second._states) == ([], [])


def test_a_closing_thread_lets_go_of_its_own_state_and_of_ended_ones() -> None:
    before, kept = states(), ThreadStates()
    Foreign(kept.keep).run()
    Foreign(kept.keep).run()
    assert len(states() - before) == 2
    Foreign(kept.keep, kept.let_go).run()
    assert states() == before


def test_a_request_that_fails_after_it_was_kept_leaves_nothing_more() -> None:
    before, kept = states(), ThreadStates()

    def fail() -> None:
        kept.keep()
        with pytest.raises(OSError, match="request"):
            raise OSError("request")

    Foreign(fail, fail, fail, kept.let_go).run()
    assert states() == before


def test_what_a_thread_had_for_itself_goes_with_its_state() -> None:
    """Its thread-local data would otherwise hold on to whatever it refers to."""

    class Mine:
        pass

    local, kept = threading.local(), ThreadStates()
    seen: list[weakref.ref[Mine]] = []

    def serve() -> None:
        kept.keep()
        if not seen:
            local.mine = Mine()
            seen.append(weakref.ref(local.mine))

    Foreign(serve, serve).run()
    assert seen[0]() is not None, "of a kept state it stays"
    kept.let_go()
    assert seen[0]() is None


def test_the_state_of_a_thread_that_lives_on_stays_until_it_has_ended() -> None:
    """nbdkit's filter multi-conn: one client's requests come over another one's threads, which outlive it."""
    before, kept, later = states(), ThreadStates(), ThreadStates()
    served, closed = threading.Event(), threading.Event()

    def serve() -> None:
        kept.keep()
        served.set()
        assert closed.wait(DEADLINE_S)

    foreign = Foreign(serve, later.keep, later.keep)
    running = begin(foreign.run)
    assert served.wait(DEADLINE_S)
    kept.let_go()
    assert foreign.seen[0] in states()
    closed.set()
    seen = running.result(DEADLINE_S)
    assert len(set(seen)) == 1, "it goes on with the same"
    # The thread that ran it has one for itself until it has ended.
    assert seen[0] in states()
    later.let_go()
    assert seen[0] not in states()
    assert threads._left == []
    wait_until(lambda: states() == before, "nothing is left")


def test_states_that_no_thread_can_be_had_to_delete_are_deleted_with_the_next_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, first, second = states(), ThreadStates(), ThreadStates()
    Foreign(first.keep).run()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        first.let_go()
    assert len(states() - before) == 1
    second.let_go()
    assert states() == before


def test_a_thread_from_outside_may_let_go_of_the_states_of_others_and_go_on() -> None:
    """Since Python 3.12 a deletion takes the entry of the deleting thread, which ended the process when its call
    returned."""
    before, kept = states(), ThreadStates()
    for _ in range(3):
        Foreign(kept.keep).run()
    seen = Foreign(kept.let_go, lambda: None, kept.keep, kept.let_go).run()
    assert len(seen) == CALLS
    assert states() == before
