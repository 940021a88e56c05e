# SPDX-License-Identifier: BSD-3-Clause
"""peer.py and control/inband.py, both ends together over a real nbdkit, and peer.py against servers that lie."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from content import make_raw, pattern
from lab import Lab
from nbdprocess import NbdProcess, silent
from nodes import nbd_refusal
from replication.control.inband import WAIT_S
from replication.disk.connection import Connection, ExportRefused
from replication.errors import DiskError
from replication.options import CONTROL_EXPORT
from replication.primary import peer
from replication.primary.peer import CONTROL_DESCRIPTION, CONTROL_SIZE, MESSAGE_BYTES_MAX, Peer, PeerError
from waiting import DEADLINE_S, wait_until

SERVER = """
import errno, os, sys, threading, time
import nbdkit
sys.path[:0] = [{repository!r}]
sys.path.append("/usr/lib/python3/dist-packages")
from replication.control import inband
from replication.control.inband import ControlExport
from replication.control.qmp import Answer
from replication.errors import CommandError, DiskError
from replication.events import EventHub
API_VERSION = 2
inband.WAIT_S = {wait_s}
hub = EventHub()
opened = closed = 0
lock = threading.Lock()

def count_closed():
    global closed
    with lock:
        closed += 1

def execute(name, arguments):
    if name == "echo":
        return Answer(arguments)
    if name == "refuse":
        raise CommandError("No such thing")
    if name == "emit":
        for number in range(arguments["count"]):
            hub.emit("TICK", number=number)
        return Answer({{}})
    if name == "wait":
        open_file(arguments["file"] + ".begun")
        deadline = time.monotonic() + 60
        while not os.path.exists(arguments["file"]) and time.monotonic() < deadline:
            time.sleep(0.002)
        return Answer("waited")
    if name == "large":
        return Answer("x" * arguments["length"])
    if name == "counts":
        threads = [thread.name for thread in threading.enumerate()]
        return Answer({{"opened": opened, "closed": closed, "workers": threads.count("control-inband")}})
    raise CommandError("unknown", "CommandNotFound")

def open_file(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

def config(key, value):
    raise ValueError(key)

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    global opened
    if nbdkit.export_name() != ".control":
        raise ValueError("no such export")
    with lock:
        opened += 1
    return ControlExport(execute, hub, count_closed)

def close(h):
    h.close()

def get_size(h):
    return h.size

def export_description(h):
    return h.description

def can_write(h):
    return True

can_flush = can_trim = can_zero = can_extents = can_write

def call(function, *arguments):
    try:
        return function(*arguments)
    except DiskError as error:
        nbdkit.set_error(error.wire_errno)
        raise

def pread(h, buf, offset, flags):
    call(h.read, buf, offset)

def pwrite(h, buf, offset, flags):
    call(h.write, buf, offset, False)

def zero(h, count, offset, flags):
    call(h.zero, offset, count, False, False)

def trim(h, count, offset, flags):
    call(h.zero, offset, count, True, False)

def flush(h, flags):
    h.flush()

def extents(h, count, offset, flags):
    return [(e.offset, e.length, 0) for e in h.extents(offset, count)]
"""


class ControlServer(NbdProcess):
    """nbdkit serving a ControlExport with the commands of SERVER."""

    def __init__(self, folder: Path, threads: int = 16, wait_s: float = WAIT_S) -> None:
        super().__init__(folder, "server")
        self.script = folder / "server.py"
        self.script.write_text(SERVER.format(repository=str(REPOSITORY), wait_s=wait_s))
        self.threads = threads

    def command(self) -> list[str]:
        command = ["nbdkit", "-f", "-U", str(self.socket_path), "-t", str(self.threads), "--exit-with-parent"]
        return [*command, "python", str(self.script)]


def patient(uri: str, export: str, _: float) -> Connection:
    """Connect with all the time that a busy machine needs; the timeout is for the link then."""
    return Connection(uri, export, DEADLINE_S)


class Owner:
    """A peer and what it has told."""

    def __init__(self, uri: str, timeout_s: float = DEADLINE_S) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.lost: queue.Queue[DiskError] = queue.Queue()
        peer = Peer.open(uri, timeout_s, patient, self._on_event, self.lost.put)
        assert peer is not None
        self.peer = peer

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def call(self, command: str, timeout_s: float = DEADLINE_S, **arguments: Any) -> Any:
        return self.peer.call(command, arguments, timeout_s)

    def check_lost(self, pattern: str) -> None:
        """The link is lost for that reason, told once, and every call says so; the thread has ended."""
        error = self.lost.get(timeout=DEADLINE_S)
        assert pattern in str(error)
        with pytest.raises(DiskError, match=pattern):
            self.call("echo")
        wait_until(lambda: not peer_threads(), "the thread ends")
        assert self.lost.empty()


def peer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "peer"]


@contextlib.contextmanager
def linked(server: NbdProcess, timeout_s: float = DEADLINE_S) -> Iterator[Owner]:
    owner = Owner(server.uri(), timeout_s)
    try:
        yield owner
    finally:
        owner.peer.close()
        assert not owner.peer._thread.is_alive()


@pytest.fixture
def server(lab: Lab) -> ControlServer:
    return lab.start(ControlServer(lab.folder))


# -- both ends -----------------------------------------------------------------------------------------------------


def test_a_command_is_answered_and_a_refusal_says_why(server: ControlServer) -> None:
    with linked(server) as owner:
        assert owner.call("echo", a=[1, {"b": "\u00e4\n"}]) == {"a": [1, {"b": "\u00e4\n"}]}
        with pytest.raises(PeerError, match=r"^No such thing$"):
            owner.call("refuse")
        assert owner.call("echo") == {}, "the link goes on"
    assert owner.lost.empty()


def test_an_idle_link_is_heard_and_never_lost(server: ControlServer) -> None:
    with linked(server, 3.0) as owner:
        first = owner.peer.last_heard
        wait_until(lambda: owner.peer.last_heard > first + 3.6, "it is heard for longer than the timeout")
        assert owner.call("echo", a=1) == {"a": 1}
        assert owner.lost.empty()


def test_a_timeout_shorter_than_the_signs_of_life_is_made_longer(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of it longer than it is, because the greeting has to come within the timeout as well.
    monkeypatch.setattr(peer, "SILENCE_MIN_S", 4.0)
    monkeypatch.setattr(peer, "PAUSE_S", 1.5)
    with linked(server, 1.0) as owner:
        assert owner.peer._connection.timeout_s == 4.0
        first = owner.peer.last_heard
        wait_until(lambda: owner.peer.last_heard > first + 2.5, "it is heard for longer than the timeout")
        assert owner.lost.empty()


def test_signs_of_life_come_while_a_command_is_at_work(server: ControlServer, lab: Lab) -> None:
    flag = lab.folder / "flag"
    with linked(server) as owner, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(owner.call, "wait", file=str(flag))
        wait_until(Path(f"{flag}.begun").exists, "the command is at work")
        heard = []
        for _ in range(4):
            before = owner.peer.last_heard
            heard.append(wait_until(lambda before=before: owner.peer.last_heard - before, "a sign of life"))
        assert not waiting.done()
        assert sorted(heard)[1] < 0.5
        flag.touch()
        assert waiting.result(DEADLINE_S) == "waited"


def test_events_come_in_order_before_the_answer_of_what_caused_them(server: ControlServer) -> None:
    with linked(server) as owner, linked(server) as other:
        assert owner.call("emit", count=300) == {}
        assert owner.events == [("TICK", {"number": number}) for number in range(300)]
        wait_until(lambda: len(other.events) == 300, "the other client gets them, too")
        assert other.events == owner.events


def test_a_long_answer_arrives_whole(server: ControlServer) -> None:
    with linked(server) as owner:
        for length in (16 << 10, (16 << 10) - 30, 900_000):
            assert owner.call("large", length=length) == "x" * length
        assert owner.call("echo", text="y" * 900_000) == {"text": "y" * 900_000}


def test_an_answer_too_long_loses_the_link(server: ControlServer) -> None:
    with linked(server) as owner:
        with pytest.raises(DiskError, match="more than"):
            owner.call("large", length=2 * MESSAGE_BYTES_MAX)
        owner.check_lost("more than")


def test_a_command_too_long_is_refused_here(server: ControlServer) -> None:
    with linked(server) as owner:
        with pytest.raises(DiskError, match="too long"):
            owner.call("echo", text="y" * CONTROL_SIZE)
        assert owner.call("echo") == {}


def test_calls_of_many_threads_get_their_own_answers(server: ControlServer) -> None:
    with linked(server) as owner, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> None:
            for round_ in range(40):
                assert owner.call("echo", value=number * 1000 + round_) == {"value": number * 1000 + round_}

        for end in [pool.submit(work, number) for number in range(8)]:
            end.result(DEADLINE_S)


def test_commands_beyond_what_may_wait_are_not_taken_and_the_others_are_answered(
    server: ControlServer, lab: Lab
) -> None:
    flag = lab.folder / "flag"
    with linked(server) as owner, ThreadPoolExecutor(20) as pool:
        first = pool.submit(owner.call, "wait", file=str(flag))
        wait_until(Path(f"{flag}.begun").exists, "the command is at work")
        more = [pool.submit(owner.call, "echo", value=number) for number in range(18)]
        wait_until(lambda: sum(end.done() for end in more) == 2, "two of eighteen are refused")
        flag.touch()
        assert first.result(DEADLINE_S) == "waited"
        refused = [end for end in more if end.exception(DEADLINE_S)]
        assert len(refused) == 2
        for end in refused:
            assert "not taken" in str(end.exception())
        assert owner.lost.empty()
    wait_until(lambda: "16 pieces of control input" in server.stderr(), "the log says why")


def test_an_answer_that_comes_too_late_is_dropped(server: ControlServer, lab: Lab) -> None:
    flag = lab.folder / "flag"
    with linked(server) as owner:
        with pytest.raises(DiskError, match="no answer to wait within") as late:
            owner.call("wait", 0.05, file=str(flag))
        assert late.value.errno == errno.ETIMEDOUT
        flag.touch()
        assert owner.call("echo", a=1) == {"a": 1}


def test_a_killed_server_is_noticed_at_once_by_calls_and_owner(server: ControlServer, lab: Lab) -> None:
    flag = lab.folder / "flag"
    with linked(server) as owner, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(owner.call, "wait", file=str(flag))
        wait_until(Path(f"{flag}.begun").exists, "the command is at work")
        begun = time.monotonic()
        server.kill()
        assert "lost the connection" in str(waiting.exception(DEADLINE_S))
        owner.check_lost("lost the connection")
        assert time.monotonic() - begun < DEADLINE_S / 2


def test_a_server_that_stands_still_is_lost_within_the_timeout(server: ControlServer) -> None:
    with linked(server, 2.5) as owner, silent(server):  # the greeting has to come within that as well
        begun = time.monotonic()
        with pytest.raises(DiskError, match="no progress"):
            owner.call("echo")
        owner.check_lost("no progress")
        assert 0.5 < time.monotonic() - begun < DEADLINE_S / 2
    server.kill()  # nbdkit 1.32 may abort by itself when it finds its client gone (hangup.py)


def test_close_during_a_command_fails_it_and_leaves_in_good_order(server: ControlServer, lab: Lab) -> None:
    flag = lab.folder / "flag"
    owner = Owner(server.uri())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(owner.call, "wait", file=str(flag))
        wait_until(Path(f"{flag}.begun").exists, "the command is at work")
        owner.peer.close()
        with pytest.raises(DiskError, match="closed"):
            waiting.result(DEADLINE_S)
    with pytest.raises(DiskError, match="closed"):
        owner.call("echo")
    owner.peer.close()
    assert owner.lost.empty()
    assert not peer_threads()
    flag.touch()
    with linked(server) as other:
        wait_until(lambda: other.call("counts")["workers"] == 1, "the first client's thread ends")
    assert server.stderr() == "", "nbdkit has nothing to complain of"


def test_close_during_a_command_does_not_wait_for_the_end_of_a_read(lab: Lab) -> None:
    wait_s = 3.0
    server = lab.start(ControlServer(lab.folder, wait_s=wait_s))
    flag = lab.folder / "flag"
    took = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(9):
            owner = Owner(server.uri())
            waiting = pool.submit(owner.call, "wait", file=str(flag))
            wait_until(Path(f"{flag}.begun").exists, "the command is at work")
            Path(f"{flag}.begun").unlink()
            begun = time.monotonic()
            owner.peer.close()
            took.append(time.monotonic() - begun)
            assert waiting.exception(DEADLINE_S)
    flag.touch()
    assert sorted(took)[4] < wait_s / 4


def test_close_of_a_link_to_a_server_that_stands_still_ends(server: ControlServer) -> None:
    owner = Owner(server.uri())
    with silent(server):
        begun = time.monotonic()
        owner.peer.close()
        assert time.monotonic() - begun < DEADLINE_S / 2
        assert not peer_threads()
    assert owner.lost.empty()
    server.kill()  # as above


def test_the_owner_may_close_when_it_is_told_of_the_loss(server: ControlServer) -> None:
    told = threading.Event()

    def lost(_: DiskError) -> None:
        peer.close()
        told.set()

    peer = Peer.open(server.uri(), DEADLINE_S, Connection, print, lost)
    assert peer is not None
    server.kill()
    assert told.wait(DEADLINE_S)
    wait_until(lambda: not peer_threads(), "the thread ends")


def test_a_thousand_connections_leave_nothing_behind(server: ControlServer) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(900):
        connection = Connection(server.uri(), CONTROL_EXPORT, DEADLINE_S)
        connection.close()
    for _ in range(100):
        with linked(server) as owner:
            assert owner.lost.empty()
    assert not peer_threads()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    with linked(server) as owner:
        counts = wait_until(
            lambda: (found := owner.call("counts"))["closed"] == found["opened"] - 1 and found, "all are closed"
        )
        assert counts["opened"] >= 1001
        wait_until(lambda: owner.call("counts")["workers"] == 1, "only this client has a thread")


def test_a_defect_of_the_owners_ends_the_link_and_not_the_process(
    server: ControlServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, data: dict[str, Any]) -> None:
        raise KeyError(name)

    lost: queue.Queue[DiskError] = queue.Queue()
    peer = Peer.open(server.uri(), DEADLINE_S, Connection, broken, lost.put)
    assert peer is not None
    with pytest.raises(DiskError, match="internal error"):
        peer.call("emit", {"count": 1}, DEADLINE_S)
    assert "internal error" in str(lost.get(timeout=DEADLINE_S))
    assert "KeyError: 'TICK'" in capsys.readouterr().err
    peer.close()


def test_without_a_thread_there_is_no_link(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(DiskError, match="no thread for the control link"):
            Owner(server.uri())
    with linked(server) as owner:
        wait_until(lambda: owner.call("counts")["closed"] == 1, "the first connection is closed")


# -- servers that are no secondaries -------------------------------------------------------------------------------


def opened(uri: str) -> Peer | None:
    return Peer.open(uri, DEADLINE_S, Connection, print, print)


@pytest.mark.parametrize("size", [CONTROL_SIZE, 3 << 20])
def test_a_server_that_takes_any_name_is_no_peer_and_its_disk_is_not_touched(lab: Lab, size: int) -> None:
    content = pattern(1, size)
    server = lab.endpoint(path=make_raw(lab.folder / "disk", size, content))
    assert opened(server.uri()) is None
    assert not peer_threads()
    server.terminate()
    assert (lab.folder / "disk").read_bytes() == content


def test_a_server_without_such_an_export_is_no_peer(lab: Lab) -> None:
    server = lab.qemu_nbd(make_raw(lab.folder / "disk", 1 << 20), export="disk0")
    assert opened(server.uri()) is None


def test_a_refusal_for_another_reason_is_an_error() -> None:
    def connect(*_: object) -> Connection:
        raise ExportRefused("the server is shutting down", errno.ESHUTDOWN)

    with pytest.raises(ExportRefused, match="shutting down"):
        Peer.open("nbd://nowhere", 1.0, connect, print, print)


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot connect") as failure:
        opened(f"nbd+unix:///?socket={tmp_path}/nobody")
    assert not isinstance(failure.value, ExportRefused)
    assert not peer_threads()


# -- servers that lie ----------------------------------------------------------------------------------------------

LIAR = """
import errno, json, threading
import nbdkit
API_VERSION = 2
changed = threading.Condition()
output, writes, reads = bytearray(), [], 0

def config(key, value):
    global script
    script = json.loads(value)
    output.extend(script["greeting"].encode("latin-1"))

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return 1

def get_size(h):
    return script.get("size", {size})

def export_description(h):
    return script.get("description", "{description}")

def can_write(h):
    return True

def pread(h, buf, offset, flags):
    global reads
    with changed:
        reads += 1
        if script.get("refuse") and writes:
            nbdkit.set_error(errno.EIO)
            raise OSError("no reads any more")
        changed.wait_for(lambda: output, script.get("hold", 0.25))
        part = bytes(output[: len(buf)])
        del output[: len(buf)]
        fill = script.get("fill", "\\n").encode() if len(writes) > 1 else b"\\n"
        buf[:] = part + fill * (len(buf) - len(part))

def pwrite(h, buf, offset, flags):
    with changed:
        writes.append(bytes(buf))
        if script.get("no_writes") and len(writes) > 1:
            nbdkit.set_error(errno.ENOMEM)
            raise OSError("no writes any more")
        if len(writes) <= len(script["replies"]):
            output.extend(script["replies"][len(writes) - 1].replace("READS", str(reads)).encode("latin-1"))
        changed.notify_all()
"""

GREETING = '{"QMP": {"version": {}, "capabilities": []}}\r\n'
WELCOME = '{"return": {}, "id": 1}\r\n'


class Liar(NbdProcess):
    """nbdkit whose control export greets with `greeting` and says the nth of `replies` after the nth write; LIAR knows
    what else `script` may hold."""

    def __init__(self, folder: Path, *replies: str, greeting: str = GREETING, **script: Any) -> None:
        super().__init__(folder, "liar")
        self.path = folder / "liar.py"
        self.path.write_text(LIAR.format(size=CONTROL_SIZE, description=CONTROL_DESCRIPTION))
        self.script = {"greeting": greeting, "replies": replies, **script}

    def command(self) -> list[str]:
        command = ["nbdkit", "-f", "-U", str(self.socket_path), "--exit-with-parent"]
        return [*command, "python", str(self.path), f"script={json.dumps(self.script)}"]


def test_a_wrong_description_or_size_is_no_peer(lab: Lab) -> None:
    for script in ({"description": CONTROL_DESCRIPTION + "s"}, {"description": ""}, {"size": CONTROL_SIZE + 1}):
        with Liar(lab.folder, **script) as liar:
            assert opened(liar.uri()) is None


@pytest.mark.parametrize(
    ("greeting", "cause"),
    [
        ("hello\n", "no JSON"),
        ('{"return": {}, "id": 1}\n', "no greeting"),
        ('{"QMP": 1}\n', "no greeting"),
        ('{"event": "A"}\n', "no greeting"),
        ("x" * 70_000 + "\n", "no JSON"),
    ],
    ids=["text", "answer", "type", "event", "long"],
)
def test_what_does_not_greet_is_an_error(lab: Lab, greeting: str, cause: str) -> None:
    liar = lab.start(Liar(lab.folder, greeting=greeting))
    lost: list[DiskError] = []
    with pytest.raises(DiskError, match=f"does not speak QMP.*{cause}"):
        Peer.open(liar.uri(), DEADLINE_S, Connection, print, lost.append)
    assert not lost
    assert not peer_threads()


def test_what_greets_and_then_says_nothing_is_an_error(lab: Lab) -> None:
    liar = lab.start(Liar(lab.folder))
    with pytest.raises(DiskError, match=r"no answer to qmp_capabilities within 0\.3 s"):
        Peer.open(liar.uri(), 0.3, patient, print, print)
    assert not peer_threads()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("no JSON\n", "no JSON"),
        ("\xff\xfe\n", "no JSON"),
        ("[" * 100_000 + "\n", "no JSON"),
        ("1" * 5000 + "\n", "no JSON"),
        ('{"event": "\\ud800"}\n', "no JSON"),
        ("[1]\n", "no object"),
        ('{"QMP": {}}\n', "unknown kind"),
        ('{"event": 1}\n', "an event of wrong types"),
        ('{"event": "A", "data": []}\n', "an event of wrong types"),
        ('{"return": {}, "id": 3}\n', "a command that was not sent"),
        ('{"return": {}, "id": 0}\n', "a command that was not sent"),
        ('{"return": {}, "id": true}\n', "a command that was not sent"),
        ('{"return": {}, "id": "2"}\n', "a command that was not sent"),
        ('{"return": {}}\n', "a command that was not sent"),
        ('{"error": "no", "id": 2}\n', "an error of wrong types"),
        ('{"error": {"desc": 5}, "id": 2}\n', "an error of wrong types"),
        ('{"error": {"desc": "a\\nb\\u0007c"}}\n', "an error that answers no command: a b c"),
    ],
)
def test_nonsense_loses_the_link_with_its_cause(lab: Lab, said: str, cause: str) -> None:
    liar = lab.start(Liar(lab.folder, WELCOME, said))
    with linked(liar) as owner:
        with pytest.raises(DiskError, match=cause):
            owner.call("go")
        owner.check_lost(cause)


def test_megabytes_without_a_line_end_lose_the_link(lab: Lab) -> None:
    liar = lab.start(Liar(lab.folder, WELCOME, "x", fill="x", hold=0))
    with linked(liar) as owner:
        with pytest.raises(DiskError, match="more than"):
            owner.call("go")
        assert len(owner.peer._begun) < MESSAGE_BYTES_MAX + (64 << 10)
        owner.check_lost("more than")


def test_a_server_that_refuses_to_be_read_loses_the_link(lab: Lab) -> None:
    liar = lab.start(Liar(lab.folder, refuse=True))
    with pytest.raises(DiskError, match="Input/output error"):
        opened(liar.uri())
    assert not peer_threads()


def test_a_command_that_is_not_taken_fails_with_the_reason(lab: Lab) -> None:
    liar = lab.start(Liar(lab.folder, WELCOME, no_writes=True))
    with linked(liar) as owner:
        with pytest.raises(DiskError, match="the command was not taken: Cannot allocate memory"):
            owner.call("go")
        assert owner.lost.empty()


def test_an_answer_to_one_that_no_longer_waits_is_dropped_and_data_may_be_left_out_of_an_event(lab: Lab) -> None:
    said = WELCOME + '\n \r\n{"event": "A"}\r\n{"return": 5, "id": 2}\r\n{"return": 6, "id": 2}\r\n'
    liar = lab.start(Liar(lab.folder, WELCOME, said))
    with linked(liar) as owner:
        assert owner.call("go") == 5
        assert owner.events == [("A", {})]
        assert owner.lost.empty()


def test_a_server_that_says_nothing_at_once_is_not_read_in_a_tight_loop(lab: Lab) -> None:
    answers = [f'{{"return": READS, "id": {number}}}\r\n' for number in (1, 2, 4)]
    liar = lab.start(Liar(lab.folder, *answers[:2], "", answers[2], hold=0))
    with linked(liar) as owner:
        begun, first = time.monotonic(), owner.call("go")
        with pytest.raises(DiskError, match="no answer"):
            owner.call("go", 0.5)
        assert owner.call("go") - first < (time.monotonic() - begun) * 60 + 10


# -- one thread a connection ---------------------------------------------------------------------------------------


def test_with_one_nbdkit_thread_a_connection_a_call_waits_for_no_idle_read(lab: Lab) -> None:
    server = lab.start(ControlServer(lab.folder, threads=1))
    with linked(server) as owner:
        begun = time.monotonic()
        for number in range(60):
            assert owner.call("echo", number=number) == {"number": number}
            if number % 20 == 0:
                heard = owner.peer.last_heard
                wait_until(lambda heard=heard: owner.peer.last_heard > heard, "the link is idle")
        assert time.monotonic() - begun < 60 * WAIT_S / 2


def test_what_is_no_input_is_refused(server: ControlServer) -> None:
    handle = server.connect(CONTROL_EXPORT)
    assert handle.get_size() == CONTROL_SIZE
    for request in (handle.zero, handle.trim):
        with nbd_refusal(errno.EINVAL):
            request(4096, 0)
    handle.flush()
    assert handle.pread(200, 0).startswith(b'{"QMP": '), "no zeroes have become input"
    assert handle.pread(200, 4096) == b"\n" * 200
