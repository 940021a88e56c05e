# SPDX-License-Identifier: BSD-3-Clause
"""disconnect.py: who is sent away when the process is to end, before nbdkit knows, and when it is ended from here.

Each test is a process of its own: the class takes over its signals, and ends it. The script plays nbdkit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import REPOSITORY
from waiting import DEADLINE_S

SCRIPT = """
import os
import signal
import socket
import threading
import time
from replication.server import disconnect
def say(*words):
    print(*words, flush=True)
def disconnector(unended=lambda: False, control_path=None, leaving=lambda: None):
    return disconnect.Disconnector(
        lambda: say("shutdown"), control_path, unended, lambda: say("cleanup"), None, leaving
    )
def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
def wait_long():
    # Nobody ends this wait but the process's end.
    threading.Event().wait(15.0)
    say("waited in vain")
    os._exit(3)
def listen(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener
def connect(path, listener):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(15.0)
    client.connect(path)
    served, _ = listener.accept()
    served.settimeout(15.0)
    return client, served
"""


def run(script: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("how", ["send()", "send(signal.SIGINT)", "send(signal.SIGQUIT)", "it.end()"])
def test_when_nbdkit_waits_in_vain_the_process_ends_in_good_order(how: str) -> None:
    done = run(f"disconnect._GRACE_S = 0.0\nit = disconnector(lambda: True)\nit.start()\n{how}\nwait_long()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "shutdown\ncleanup\n", "")


def test_a_hangup_reloads_where_there_is_something_to_reload_and_ends_nothing() -> None:
    done = run(
        """
disconnect._GRACE_S = 0.0
reloaded = threading.Semaphore(0)
it = disconnect.Disconnector(lambda: say("shutdown"), None, lambda: True, lambda: say("cleanup"), reloaded.release)
it.start()
for _ in range(2):
    send(signal.SIGHUP)
    say(reloaded.acquire(timeout=15.0))
send()
wait_long()
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\nshutdown\ncleanup\n", "")


def test_nbdkit_has_the_time_of_grace_to_end_by_itself() -> None:
    done = run(
        """
begun = time.monotonic()
def unended():
    say("asked", time.monotonic() - begun >= disconnect._GRACE_S)
    return True
disconnector(unended).start()
send()
wait_long()
"""
    )
    assert (done.returncode, done.stdout) == (0, "shutdown\nasked True\ncleanup\n")


def test_the_process_is_not_ended_while_a_request_is_in_flight() -> None:
    done = run(
        """
disconnect._GRACE_S, disconnect._AGAIN_S = 0.0, 0.001
asked = 0
def unended():
    global asked
    asked += 1
    if asked == 20:
        say("the last request is answered")
    return asked >= 20
disconnector(unended).start()
send()
wait_long()
"""
    )
    assert (done.returncode, done.stdout) == (0, "shutdown\nthe last request is answered\ncleanup\n")


def test_looking_for_clients_again_and_again_leaves_no_descriptor_open() -> None:
    """Whatever else has to be closed in good order may still need some."""
    done = run(
        """
disconnect._GRACE_S, disconnect._AGAIN_S = 0.0, 0.001
counts = []
def unended():
    counts.append(len(os.listdir("/proc/self/fd")))
    return len(counts) == 8
it = disconnector(unended)
it._cleanup = lambda: say(len(set(counts)) == 1 or counts)
it.start()
send()
wait_long()
"""
    )
    assert (done.returncode, done.stdout) == (0, "shutdown\nTrue\n")


def test_before_a_signal_nobody_is_asked_and_nothing_ends(tmp_path: Path) -> None:
    done = run(
        """
disconnect._GRACE_S = 0.0
it = disconnector(lambda: say("asked") or True)
it.start()
listener = listen("s")
client, served = connect("s", listener)
client.sendall(b"a")
say(served.recv(1))
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "b'a'\n")


def test_only_nbd_clients_are_sent_away_and_they_are_still_answered(tmp_path: Path) -> None:
    done = run(
        """
nbd_listener, control_listener = listen("nbd"), listen("control")
nbd_client, nbd_served = connect("nbd", nbd_listener)
control_client, control_served = connect("control", control_listener)
# Our own connection to another server: the link to the secondary, say.
peer_listener = listen("peer")
link, peer_served = connect("peer", peer_listener)
peer_listener.close()

disconnect._LEAVING_S, disconnect._AGAIN_S = 0.0, 0.001
disconnect.Disconnector(lambda: None, "control", lambda: False, lambda: None).start()
send()
say("end of stream", nbd_served.recv(1))
nbd_served.sendall(b"answer")
say("answered", nbd_client.recv(6))
control_client.sendall(b"query")
say("control", control_served.recv(5))
peer_served.sendall(b"reply")
say("link", link.recv(5))
# Who is accepted while the process ends is found, too.
late_client, late_served = connect("nbd", nbd_listener)
say("end of stream", late_served.recv(1))
os._exit(0)
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "end of stream b''",
        "answered b'answer'",
        "control b'query'",
        "link b'reply'",
        "end of stream b''",
    ]


def test_nbdkit_is_told_when_those_that_it_serves_have_gone(tmp_path: Path) -> None:
    """It would answer with an error what it reads after that. One that comes meanwhile holds nobody up: it waits until
    nbdkit knows, and is served nothing then."""
    done = run(
        """
disconnect._LEAVING_S = disconnect._GRACE_S = disconnect.END_S = 15.0
listener = listen("nbd")
client, served = connect("nbd", listener)
it = disconnect.Disconnector(lambda: say("shutdown"), None, lambda: True, lambda: say("cleanup"))
say("admitted", it.admit())
it.start()
send()
say("end of stream", served.recv(1))
late_client, late_served = connect("nbd", listener)
def opened():
    say("admitted", it.admit())
    os._exit(0)
threading.Thread(target=opened).start()
# Longer than it takes to look again and again.
time.sleep(0.1)
say("answered")
served.close()
it.left()
wait_long()
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "admitted True",
        "end of stream b''",
        "answered",
        "shutdown",
        "admitted False",
    ]


def test_requests_that_begin_are_held_while_clients_are_let_go_and_what_nobody_has_read_is_taken_away(
    tmp_path: Path,
) -> None:
    """Else nbdkit reads it, sees the end of the stream, and refuses what it has just read."""
    done = run(
        """
import contextlib
disconnect._QUIET_S = disconnect._LEAVING_S = disconnect._GRACE_S = disconnect.END_S = 15.0
listener = listen("nbd")
client, served = connect("nbd", listener)
client.sendall(b"a request")
@contextlib.contextmanager
def holding(wait_s):
    say("held")
    yield
    say("read", served.recv(9))
it = disconnect.Disconnector(lambda: (say("shutdown"), os._exit(0)), None, lambda: True, lambda: None, holding=holding)
it.start()
send()
wait_long()
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["held", "read b''", "shutdown"]


def test_while_a_thread_of_nbdkit_may_be_about_to_read_nothing_is_taken_from_it(tmp_path: Path) -> None:
    """It could have read half a request."""
    done = run(
        """
disconnect._LEAVING_S = disconnect._GRACE_S = 0.0
disconnect.fell_asleep = lambda wait_s: False
listener = listen("nbd")
client, served = connect("nbd", listener)
client.sendall(b"a request")
it = disconnect.Disconnector(lambda: (say("read", served.recv(9)), os._exit(0)), None, lambda: True, lambda: None)
it.start()
send()
wait_long()
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read b'a request'\n", "")


def test_requests_that_would_wait_on_are_ended_while_clients_leave(tmp_path: Path) -> None:
    """Those of a guest that stands still. They are not answered: the client finds its connection lost."""
    done = run(
        """
disconnect._LEAVING_S = disconnect._GRACE_S = disconnect.END_S = 15.0
listener = listen("nbd")
client, served = connect("nbd", listener)
def leaving():
    it.cut()
    try:
        served.sendall(b"an answer")
    except BrokenPipeError:
        say("the client", client.recv(1))
        it.left()
it = disconnector(lambda: True, None, leaving)
it._shutdown = lambda: (say("shutdown"), os._exit(0))
it.admit()
it.start()
send()
wait_long()
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["the client b''", "shutdown"]


def test_who_does_not_go_holds_the_end_up_for_a_moment_only(tmp_path: Path) -> None:
    done = run(
        """
disconnect._GRACE_S, disconnect._LEAVING_S = 0.0, 0.05
listener = listen("nbd")
client, served = connect("nbd", listener)
it = disconnector(lambda: True)
it.admit()
it.start()
send()
wait_long()
""",
        folder=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "shutdown\ncleanup\n", "")


def test_what_does_not_end_in_time_is_left_behind() -> None:
    """Neither nbdkit, waiting for a request, nor a cleanup that waits can keep the process longer."""
    done = run("disconnect.END_S = 1.5\ndisconnector().start()\nsend()\nwait_long()")
    assert (done.returncode, done.stdout) == (0, "shutdown\n")
    assert "did not end within 1.5 s" in done.stderr
    done = run(
        """
disconnect._GRACE_S = disconnect.END_S = 0.1
disconnect.Disconnector(lambda: None, None, lambda: True, wait_long).start()
send()
wait_long()
"""
    )
    assert done.returncode == 0
    assert "did not end within 0.1 s" in done.stderr
