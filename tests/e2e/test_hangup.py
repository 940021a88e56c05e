# SPDX-License-Identifier: BSD-3-Clause
"""A client that is killed with requests in flight takes nobody with it, and any other abort still ends the process.

With nbdkit before 1.34: its race cannot be forced from outside (it lies between two of its own threads), so clients are
killed until it has been lost twice; about one kill in eleven does it. A newer one has no such race.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import REPOSITORY
from content import MIB, pattern
from lab import Lab
from nodes import Secondary, nbdkit_has
from waiting import DEADLINE_S, wait_until

SIZE = 16 * MIB
KILLS_MAX = 150
LOST_RACES = 2
END_S = 10.0

ASSERTION = "raw_send_socket: Assertion"
KEPT = "a client hung up with requests in flight"

MENDED = nbdkit_has("disconnect")
"""As Abilities.survives_hangups."""
KILLS_MENDED = 40

guard_only = pytest.mark.skipif(MENDED, reason="this nbdkit survives by itself; nothing is installed")

# Writes over the second half of the disk, and says so once the server is busy with it.
WRITER = """
import sys
import nbd
handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
data = bytearray(b"x" * 4096)
in_flight = answered = 0
def ended(error):
    global in_flight, answered
    in_flight -= 1
    answered += 1
    return 1
number = 0
while True:
    while in_flight < 64:
        handle.aio_pwrite(data, (2048 + number * 7919 % 2048) * 4096, ended)
        number += 1
        in_flight += 1
    handle.poll(1000)
    if answered >= 200:
        answered = -1 << 60
        print("busy", flush=True)
"""


def kill_a_writer(server: Secondary) -> None:
    """Start a client with 64 writes in flight and kill it."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, server.uri("disk0")], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"busy\n"
    finally:
        writer.kill()
        writer.communicate(timeout=DEADLINE_S)


def kill_until_the_race_is_lost(server: Secondary) -> None:
    for _ in range(KILLS_MAX):
        kill_a_writer(server)
        server.check_alive()
        if server.stderr().count(ASSERTION) >= LOST_RACES:
            return
    pytest.fail(
        f"nbdkit's assertion failed {server.stderr().count(ASSERTION)} times in {KILLS_MAX} kills: this nbdkit may have"
        " been mended, and replication/server/hangup.py may not be needed any more"
    )


@guard_only
def test_killed_clients_leave_a_secondary_that_serves_checkpoints_ends_and_restarts(lab: Lab) -> None:
    server = lab.secondary([SIZE], contents=[pattern(1, SIZE)])
    server.start_replication()
    target, guest = server.connect("disk0"), server.connect("top0")
    guest.pwrite(b"g" * 4096, 4096)
    kill_until_the_race_is_lost(server)

    # Connections from before and new ones, on both faces.
    before = bytearray(pattern(1, SIZE))
    before[4096:8192] = b"g" * 4096
    for face in (guest, server.connect("top0")):
        assert face.pread(SIZE, 0) == before
    for number, face in enumerate((target, server.connect("disk0"))):
        face.pwrite(b"%d" % number * 8192, number * 8192)
        face.flush()
        assert face.pread(8192, number * 8192) == b"%d" % number * 8192
    assert guest.pread(SIZE, 0) == before

    def each_is_told_of() -> bool:
        # The last one may be lost, and said by the C library, only now.
        said = server.stderr()
        return LOST_RACES <= said.count(ASSERTION) == said.count(KEPT)

    wait_until(each_is_told_of, "each lost race is told of")

    def checkpoint_equals_the_disk() -> bool:
        # What the last killed client had sent may still be on its way from its socket to the disk.
        server.checkpoint()
        return bool(guest.pread(SIZE, 0) == target.pread(SIZE, 0))

    wait_until(checkpoint_equals_the_disk, "a checkpoint shows the guest what the primary has written")
    assert server.execute("query-xen-replication-status") == {"error": False}
    checkpointed = bytearray(guest.pread(SIZE, 0))
    assert checkpointed[: 2 * 8192] == b"0" * 8192 + b"1" * 8192
    guest.pwrite(b"G" * 4096, 20480)
    checkpointed[20480:24576] = b"G" * 4096
    target.pwrite(b"t" * 4096, 40960)

    # Clients stay connected, and the threads asleep for good are waited for by nbdkit.
    os.kill(server.pid, signal.SIGTERM)
    server.wait_ended(END_S)
    server.start()
    assert server.status()["stage"] == "running"
    assert server.connect("top0").pread(SIZE, 0) == checkpointed
    assert server.connect("disk0").pread(4096, 40960) == b"t" * 4096
    server.checkpoint()
    assert server.connect("top0").pread(4096, 40960) == b"t" * 4096


@pytest.mark.skipif(not MENDED, reason="this nbdkit has the race")
def test_an_nbdkit_without_the_race_survives_by_itself(lab: Lab) -> None:
    server = lab.secondary([SIZE], contents=[pattern(1, SIZE)])
    server.start_replication()
    for _ in range(KILLS_MENDED):
        kill_a_writer(server)
        server.check_alive()
    assert ASSERTION not in server.stderr()
    guest = server.connect("top0")
    assert guest.pread(SIZE, 0) == pattern(1, SIZE)
    os.kill(server.pid, signal.SIGTERM)
    server.wait_ended(END_S)


def test_aborts_are_handled_only_where_nbdkit_has_the_race(lab: Lab) -> None:
    server = lab.secondary([SIZE])
    caught = re.search(r"^SigCgt:\t([0-9a-f]+)$", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    assert bool(int(caught[1], 16) >> (signal.SIGABRT - 1) & 1) is not MENDED


# -- which aborts are kept ---------------------------------------------------------------------------------------

GUARDED = """
import ctypes
import os
import resource
import threading
import time
from replication.server import hangup
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
libc = ctypes.CDLL(None)
guard = hangup.HangupGuard()
def fail(function):
    libc["__assert_fail"](b"sock >= 0", b"connections.c", 402, function)
def fail_in_thread(function):
    stuck = guard.stuck
    threading.Thread(target=fail, args=(function,), daemon=True).start()
    deadline = time.monotonic() + 20.0
    while guard.stuck == stuck and time.monotonic() < deadline:
        time.sleep(0.001)
"""


def guarded(script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a process of its own, with GUARDED before it."""
    return subprocess.run(
        [sys.executable, "-c", GUARDED + script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@guard_only
@pytest.mark.parametrize("function", ["raw_send_socket", "raw_send_other"])
def test_the_thread_that_meets_the_assertion_sleeps_and_the_process_lives(function: str) -> None:
    done = guarded(f"guard.install(); fail_in_thread(b'{function}'); print(guard.stuck)")
    assert (done.returncode, done.stdout) == (0, "1\n"), done
    assert f"{function}: Assertion" in done.stderr
    assert KEPT in done.stderr


@guard_only
@pytest.mark.parametrize(
    "end",
    [
        pytest.param("os.abort()", id="abort"),
        pytest.param("os.kill(os.getpid(), 6); time.sleep(10.0)", id="signal from outside"),
        pytest.param("fail(b'other_function')", id="another assertion"),
        pytest.param("fail_in_thread(b'other_function')", id="another assertion in a thread"),
        pytest.param("ctypes.pythonapi.Py_FatalError(b'fatal')", id="fatal error of Python"),
    ],
)
@pytest.mark.parametrize("before", ["", "fail_in_thread(b'raw_send_socket')"], ids=["first", "after one that was kept"])
def test_any_other_abort_ends_the_process(end: str, before: str) -> None:
    done = guarded(f"guard.install(); {before}\nprint('guarded', guard.stuck, flush=True); {end}\nprint('lives')")
    assert done.stdout == f"guarded {int(bool(before))}\n", done
    assert done.returncode == -signal.SIGABRT, done


@guard_only
def test_the_process_is_given_up_when_too_many_threads_are_asleep() -> None:
    done = guarded(
        "hangup.STUCK_MAX = 2; guard.install()\n"
        "fail_in_thread(b'raw_send_socket'); fail_in_thread(b'raw_send_socket')\n"
        "print(guard.stuck, flush=True); fail(b'raw_send_socket')"
    )
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "2\n"), done


@guard_only
def test_where_the_c_library_tells_no_reason_no_abort_is_kept() -> None:
    done = guarded("guard._message = None; guard.install(); fail(b'raw_send_socket')")
    assert done.returncode == -signal.SIGABRT, done
    assert "this C library does not tell why it aborts" in done.stderr


@guard_only
def test_many_threads_may_meet_the_assertion_at_once() -> None:
    """As when a whole host dies that had several connections."""
    done = guarded(
        """
guard.install()
together = threading.Barrier(8)
def meet():
    together.wait()
    fail(b"raw_send_socket")
for _ in range(8):
    threading.Thread(target=meet, daemon=True).start()
deadline = time.monotonic() + 10.0
while guard.stuck < 8 and time.monotonic() < deadline:
    time.sleep(0.001)
print(guard.stuck)
"""
    )
    assert (done.returncode, done.stdout) == (0, "8\n"), done
