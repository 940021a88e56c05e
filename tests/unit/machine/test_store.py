# SPDX-License-Identifier: BSD-3-Clause
"""Host B's half of scripts/ft-agent: which state belongs to the disk, and what the receiver keeps."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from replication.machine.monitor import FtError, Late, Monitor, Refused
from replication.machine.receiver import Receiver, is_whole
from replication.machine.remote import Remote
from replication.machine.store import Record, Store, Unit
from replication.machine.takeover import unit_of
from waiting import DEADLINE_S, begin, wait_until

DESCRIPTION = b'{"page_size": 4096, "devices": [{"name": "ram"}]}'
STATE = b"QEVM" + bytes(5000) + b"\0\6" + len(DESCRIPTION).to_bytes(4) + DESCRIPTION
SMALL_S = 0.2
STATE_S = 3.0
"""Much longer than a state takes to come on a busy machine; one test waits for it in vain."""
BYTES_MAX = 1 << 16

THREE = Unit(3, "a.state", 10, 1000.0)
FOUR = Unit(4, "b.state", 10, 2000.0)
BOTH = Record(committed=THREE, prepared=FOUR)


# -- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "epoch", "asked", "expected"),
    [
        pytest.param(BOTH, 3, True, THREE, id="A has died before the disk took it"),
        pytest.param(BOTH, 4, True, FOUR, id="A has died after the disk took it"),
        pytest.param(BOTH, 4, False, None, id="somebody on B has taken a checkpoint, and that is its number"),
        pytest.param(BOTH, 5, True, None, id="somebody else has taken a checkpoint"),
        pytest.param(Record(committed=FOUR), 4, False, FOUR, id="marked: A knows that the disk has taken it"),
        pytest.param(Record(prepared=FOUR), 4, True, FOUR, id="the first one ever"),
        pytest.param(Record(), 1, True, None, id="none yet"),
    ],
)
def test_the_state_is_the_one_of_the_disks_last_checkpoint(
    record: Record, epoch: int, asked: bool, expected: Unit | None
) -> None:
    assert record.of(epoch, asked) is expected


# -- the folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "states")
    lock = store.lock()
    yield store
    os.close(lock)


def put(store: Store, epoch: int) -> None:
    (store.folder / f"{epoch}.state").write_bytes(STATE)
    store.prepare(epoch, f"{epoch}.state", len(STATE))


def states(store: Store) -> set[str]:
    return {path.name for path in store.folder.glob("*.state")}


def test_the_state_before_stays_until_the_next_is_committed(store: Store) -> None:
    put(store, 2)
    store.commit(2)
    put(store, 3)
    assert states(store) == {"2.state", "3.state"}
    store.commit(3)
    assert states(store) == {"3.state"}
    assert store.load().committed == store.load().of(3, False)


def test_what_is_given_up_goes_and_what_is_committed_stays(store: Store) -> None:
    put(store, 2)
    store.commit(2)
    put(store, 3)
    store.abort()
    assert states(store) == {"2.state"}
    with pytest.raises(FtError, match="state 3 is not prepared"):
        store.commit(3)


@pytest.mark.parametrize(("epoch", "left"), [(2, {"2.state"}), (3, {"3.state"}), (4, set())])
def test_what_is_undecided_is_settled_by_the_disk(store: Store, epoch: int, left: set[str]) -> None:
    put(store, 2)
    store.commit(2)
    put(store, 3)
    store.settle(epoch, True)
    assert states(store) == left
    assert store.load().prepared is None


def test_half_a_state_is_removed_at_the_next_start(tmp_path: Path, store: Store) -> None:
    put(store, 2)
    (store.folder / "half.state").write_bytes(b"QEVM")
    with pytest.raises(FtError, match="another ft-agent"):
        store.lock()
    store.sweep()
    assert states(store) == {"2.state"}
    assert store.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"committed": null}',
        '{"committed": {"epoch": 1}, "prepared": null}',
        '{"committed": {"epoch": 1, "file": "../x", "bytes": 1, "prepared": 1}, "prepared": null}',
    ],
)
def test_a_record_that_is_none_is_an_error(store: Store, text: str) -> None:
    (store.folder / "units.json").write_text(text)
    with pytest.raises(FtError, match="record of states"):
        store.load()


def test_a_state_is_whole_only_to_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(STATE)
    assert is_whole(path)
    for length in (0, 4, 100, *range(len(STATE) - len(DESCRIPTION) - 8, len(STATE))):
        path.write_bytes(STATE[:length])
        assert not is_whole(path), length
    path.write_bytes(STATE + b"}")
    assert not is_whole(path)


# -- the receiver --------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A receiver, and what stands for nbdkit of B."""

    store: Store
    path: Path
    control: socket.socket
    status: dict[str, Any]

    def agent(self) -> Remote:
        return Remote(self.path, DEADLINE_S)

    def stream(self, data: bytes = STATE) -> socket.socket:
        """What QEMU does; the end is not sent yet."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        connection.sendall(data)
        return connection

    def bring(self, agent: Remote, epoch: int) -> None:
        """A whole state, prepared."""
        agent.call("begin", DEADLINE_S)
        self.stream().close()
        assert agent.call("prepare", DEADLINE_S, epoch) == {"bytes": len(STATE)}

    def tell_status(self) -> None:
        """Answer one client of the control socket."""
        connection = self.control.accept()[0]
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b'{"QMP": {}}\n')
            for value in ({}, self.status):
                request = json.loads(lines.readline())
                connection.sendall(json.dumps({"return": value, "id": request["id"]}).encode() + b"\n")


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


@pytest.fixture
def served(tmp_path: Path, store: Store) -> Iterator[Served]:
    path, control = tmp_path / "receiver", tmp_path / "control"
    receiver = Receiver(store, control, BYTES_MAX, DEADLINE_S, STATE_S)
    # The thread that serves ends with the process, as it does in ft-agent.
    begin(receiver.serve, listener(path))
    with listener(control) as asked:
        yield Served(store, path, asked, {"mode": "secondary", "epoch": 0, "checkpoint-of-primary": False})


def test_a_unit_comes_step_by_step(served: Served) -> None:
    agent = served.agent()
    for epoch in (2, 3):
        served.bring(agent, epoch)
        assert served.store.load().prepared is not None
        agent.call("commit", DEADLINE_S, epoch)
        committed = served.store.load().committed
        assert committed is not None
        assert committed.epoch == epoch
        assert (served.store.folder / committed.file).read_bytes() == STATE
    assert len(states(served.store)) == 1
    agent.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (STATE[:-1], "too early"),
        (b"QEVM" + bytes(BYTES_MAX), f"larger than {BYTES_MAX} bytes"),
        (b"", "no state has come"),
    ],
    ids=["cut off", "too large", "nothing"],
)
def test_a_state_that_is_not_whole_is_refused_and_leaves_nothing(served: Served, data: bytes, error: str) -> None:
    agent = served.agent()
    agent.call("begin", DEADLINE_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(served.path))
    if len(data) < BYTES_MAX:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    else:
        begin(connection.sendall, data)  # nobody takes all of it
    with pytest.raises(Refused, match=error):
        agent.call("prepare", DEADLINE_S, 2)
    agent.call("abort", DEADLINE_S)
    connection.close()
    assert not states(served.store)
    served.bring(agent, 3)
    agent.close()


def test_an_unfinished_state_goes_with_its_agent(served: Served) -> None:
    agent = served.agent()
    agent.call("begin", DEADLINE_S)
    with served.stream():
        wait_until(lambda: states(served.store), "the state comes")
        agent.close()
        wait_until(lambda: not states(served.store), "the state is removed")


def test_nobody_can_send_a_state_that_is_not_expected(served: Served) -> None:
    with served.stream() as uninvited:
        uninvited.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            uninvited.recv(1)
    assert not states(served.store)


def test_a_newer_agent_replaces_an_older_one(served: Served) -> None:
    older, newer = served.agent(), served.agent()
    older.call("begin", DEADLINE_S)
    newer.call("begin", DEADLINE_S)
    with pytest.raises(FtError):
        older.call("begin", DEADLINE_S)
    served.bring(newer, 2)
    newer.close()


@pytest.mark.parametrize(("epoch", "committed"), [(2, None), (3, 3)], ids=["not taken", "taken"])
def test_the_next_begin_asks_the_disk_whether_it_has_taken_what_is_undecided(
    served: Served, epoch: int, committed: int | None
) -> None:
    first = served.agent()
    served.bring(first, 3)
    first.close()
    assert served.store.load().prepared is not None
    served.status |= {"epoch": epoch, "checkpoint-of-primary": True}
    told = begin(served.tell_status)
    second = served.agent()
    second.call("begin", DEADLINE_S)
    told.result(DEADLINE_S)
    record = served.store.load()
    assert (record.committed and record.committed.epoch, record.prepared) == (committed, None)
    second.close()


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b'{"do": "dance"}\n',
        b"{]\n",
        *(b'{"do": "prepare", "epoch": %s}\n' % odd for odd in (b'"x"', b"1e999", b"NaN", b"-1", b"1.5", b"9" * 30)),
    ],
)
def test_what_is_not_understood_is_answered_with_an_error(served: Served, line: bytes) -> None:
    with served.stream(line) as connection:
        connection.settimeout(DEADLINE_S)
        assert b"not understood" in connection.recv(4096)


def test_a_receiver_that_is_silent_ends_the_connection(tmp_path: Path) -> None:
    with listener(tmp_path / "silent"):
        remote = Remote(tmp_path / "silent", DEADLINE_S)
        with pytest.raises(Late):
            remote.call("begin", SMALL_S)
        with pytest.raises(FtError):
            remote.call("begin", SMALL_S)


class Disk:
    """What unit_of asks of nbdkit on B."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def execute(self, command: str, *_arguments: object, **_named: object) -> Any:
        assert command == "query-replication"
        return {"mode": "secondary", "epoch": self._epoch, "checkpoint-of-primary": True}


def test_a_state_with_which_a_guest_has_gone_on_is_not_brought_back_once_more(store: Store) -> None:
    store.save(BOTH)
    (store.folder / THREE.file).write_bytes(b"")
    disk = cast(Monitor, Disk(3))
    assert unit_of(store, disk) == THREE
    store.resume(3)
    with pytest.raises(FtError, match="gone on with state 3 already"):
        unit_of(store, disk)
    store.settle(3, True)  # the agent of a new pair asks the disk where it stands
    with pytest.raises(FtError, match="gone on with state 3 already"):
        unit_of(store, disk)


def test_a_state_is_brought_back_by_one_at_a_time_and_once(store: Store) -> None:
    store.save(BOTH)
    with store.resuming():
        store.resume(3)
        with pytest.raises(FtError, match="another ft-agent brings"), Store(store.folder).resuming():
            pass
    with store.resuming(), pytest.raises(FtError, match="gone on with state 3 already"):
        store.resume(3)  # who had looked before the other one went on


def test_that_a_guest_has_gone_on_is_stable_before_it_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a power cut is the one that was synced: its guest's writes may be on the disk."""
    store.save(BOTH)
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path.read_bytes() if path.is_file() else path.name.encode())

    monkeypatch.setattr(os, "fsync", fsync)
    store.resume(3)
    assert b'"resumed": 3' in synced[0]
    assert synced[1] == store.folder.name.encode()
