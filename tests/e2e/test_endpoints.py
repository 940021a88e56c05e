# SPDX-License-Identifier: BSD-3-Clause
"""Where a disk can be: a file, a block device, behind NBD servers of every kind; and servers that die or never answer.

Each kind is exercised on both sides of a pair with requests at every alignment, against a model in Python bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from content import KIB, MIB, make_raw, pattern, qemu_img
from lab import Lab
from nodes import Server, drained, nbd_refusal
from qmp import QmpError
from waiting import DEADLINE_S, wait_until

BEFORE = pattern(11, MIB)


class Place:
    """One disk somewhere: what goes after `disk=`, and how to see its content from outside."""

    def __init__(self, location: str, content: Callable[[], bytes]) -> None:
        self.location = location
        self.content = content


def a_file(lab: Lab, name: str) -> Place:
    path = make_raw(lab.folder / f"{name}.raw", MIB, BEFORE)
    return Place(str(path), path.read_bytes)


def a_link(lab: Lab, name: str) -> Place:
    path = make_raw(lab.folder / f"{name}.raw", MIB, BEFORE)
    link = lab.folder / f"{name}.link"
    link.symlink_to(path.name)
    return Place(str(link), path.read_bytes)


def qcow2_behind_qemu_nbd(lab: Lab, name: str) -> Place:
    """qemu-nbd as it is by default: one client, an ordinary qcow2."""
    raw = make_raw(lab.folder / f"{name}.raw", MIB, BEFORE)
    path = lab.folder / f"{name}.qcow2"
    qemu_img("convert", "-O", "qcow2", str(raw), str(path))
    server = lab.qemu_nbd(path, name=name, image_format="qcow2", shared=1, export="disk")

    def content() -> bytes:
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(raw))
        return raw.read_bytes()

    return Place(server.uri("disk"), content)


def behind_nbdkit(lab: Lab, name: str, filters: tuple[str, ...], arguments: tuple[str, ...]) -> Place:
    path = make_raw(lab.folder / f"{name}.raw", MIB, BEFORE)
    server = lab.endpoint(path=path, name=name, filters=filters, filter_arguments=arguments)
    return Place(server.uri(), path.read_bytes)


def policy(minimum: int) -> tuple[str, ...]:
    """The server refuses whatever is not aligned to `minimum` bytes."""
    largest = max(minimum, 4 * KIB)
    return (
        f"blocksize-minimum={minimum}",
        f"blocksize-preferred={largest}",
        "blocksize-maximum=32M",
        "blocksize-error-policy=error",
    )


PLAIN = ("nozero", "noextents", "fua", "multi-conn")
PLAIN_ARGUMENTS = ("zeromode=none", "multi-conn-mode=disable")  # the fua filter offers no FUA by default

PLACES: dict[str, Callable[[Lab, str], Place]] = {
    "file": a_file,
    "link to a file": a_link,
    "qcow2 behind qemu-nbd": qcow2_behind_qemu_nbd,
    "blocks of 512": lambda lab, name: behind_nbdkit(lab, name, ("blocksize-policy",), policy(512)),
    "blocks of 4096": lambda lab, name: behind_nbdkit(lab, name, ("blocksize-policy",), policy(4096)),
    "blocks of 65536": lambda lab, name: behind_nbdkit(lab, name, ("blocksize-policy",), policy(65536)),
    "no zero, extents, fua, multi-conn": lambda lab, name: behind_nbdkit(lab, name, PLAIN, PLAIN_ARGUMENTS),
    "plain and blocks of 4096": lambda lab, name: behind_nbdkit(
        lab, name, (*PLAIN, "blocksize-policy"), (*PLAIN_ARGUMENTS, *policy(4096))
    ),
}


def a_pair(lab: Lab, primary: str, secondary: str) -> tuple[Server, Server]:
    """A pair on these two places; replication runs."""
    there = lab.start(
        Server(
            lab.folder, "secondary", ["mode=secondary", f"state={lab.folder}/s2", f"disk={secondary}", "top-id=top0"]
        )
    )
    arguments = ["mode=primary", f"state={lab.folder}/s1", f"disk={primary}", f"secondary={there.uri()}"]
    here = lab.start(Server(lab.folder, "primary", arguments))
    there.execute("xen-set-replication", enable=True, primary=False)
    here.execute("xen-set-replication", enable=True, primary=True)
    return here, there


class Half:
    """One face and what it must hold."""

    def __init__(self, handle: nbd.NBD, content: bytes) -> None:
        self.handle = handle
        self.content = bytearray(content)

    def change(self, chance: random.Random) -> None:
        """One request at an arbitrary offset; every fourth is zeroes, every fourth a trim."""
        length = chance.choice([1, 511, 512, 513, 4096, 4097, 65536, chance.randrange(1, 200 * KIB)])
        offset = chance.randrange(MIB - length + 1)
        if chance.random() < 0.3:
            offset = offset // 4096 * 4096
        flags = nbd.CMD_FLAG_FUA if chance.random() < 0.2 else 0
        kind = chance.randrange(4)
        if kind == 0:
            self.handle.zero(length, offset, flags)
            data = bytes(length)
        elif kind == 1:
            self.handle.trim(length, offset, flags)
            data = bytes(length)
        else:
            data = chance.randbytes(length)
            self.handle.pwrite(data, offset, flags)
        self.content[offset : offset + length] = data

    def check(self, what: str) -> None:
        """The face reads as it must, as a whole and in unaligned pieces, and its zeroes are zeroes."""
        assert self.handle.pread(MIB, 0) == self.content, what
        for offset, length in ((1, 1), (511, 2), (4095, 4098), (MIB - 513, 513)):
            assert self.handle.pread(length, offset) == self.content[offset : offset + length], what
        found: list[int] = []
        self.handle.block_status(MIB, 0, lambda _context, _offset, entries, _error: found.extend(entries) or 0)
        at = 0
        for length, flags in zip(found[::2], found[1::2], strict=True):
            if flags & nbd.STATE_ZERO:
                assert not any(self.content[at : at + length]), f"{what}: extents say zero at {at}"
            at += length


def exercise(lab: Lab, primary: Place, secondary: Place) -> None:
    here, there = a_pair(lab, primary.location, secondary.location)
    chance = random.Random(5)
    guest, standby = Half(here.connect(), BEFORE), Half(there.connect("top0"), BEFORE)
    for _ in range(3):
        for _ in range(25):
            guest.change(chance)
            standby.change(chance)
        drained(here)
        guest.check("the primary's guest")
        standby.check("the secondary's guest before the checkpoint")
        assert there.connect("disk0").pread(MIB, 0) == guest.content
        here.execute("replication-checkpoint")
        standby.content[:] = guest.content
        standby.check("the secondary's guest after the checkpoint")
    for _ in range(10):
        guest.change(chance)
        standby.change(chance)
    drained(here)
    guest.handle.flush()
    assert here.status()["error"] is None
    assert there.status()["error"] is None
    assert primary.content() == guest.content
    there.execute("xen-set-replication", enable=False, primary=False, failover=True)
    there.wait_stage("done")
    standby.check("the secondary's guest after failover")
    standby.change(chance)
    standby.handle.flush()
    assert secondary.content() == standby.content


def drive(handle: nbd.NBD, over: Callable[[], bool]) -> None:
    """Move a handle's requests until `over()`."""
    deadline = time.monotonic() + DEADLINE_S
    while not over():
        assert time.monotonic() < deadline, "requests never end"
        handle.poll(200)


@pytest.mark.parametrize("kind", list(PLACES))
def test_both_sides_replicate_on_a_disk_in(lab: Lab, kind: str) -> None:
    exercise(lab, PLACES[kind](lab, "place1"), PLACES[kind](lab, "place2"))


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """A block device over a file."""
    done = subprocess.run(
        ["losetup", "--find", "--show", str(path)], capture_output=True, text=True, timeout=30, check=True
    )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], timeout=30, check=True)


@pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="this machine has no loop devices")
def test_both_sides_replicate_on_block_devices(lab: Lab) -> None:
    paths = [make_raw(lab.folder / f"loop{number}.raw", MIB, BEFORE) for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        # The processes must have let go of the devices before these are taken away.
        devices = [stack.enter_context(loop_device(path)) for path in paths]
        inner = stack.enter_context(Lab())

        def content_of(device: str) -> Callable[[], bytes]:
            return lambda: Path(device).read_bytes()

        places = [Place(device, content_of(device)) for device in devices]
        exercise(inner, places[0], places[1])


def test_writes_to_one_server_block_at_once_do_not_undo_each_other(lab: Lab) -> None:
    """Each is read, changed and written back; reads take 0.2 s, so without an order all would read the same block."""
    path = make_raw(lab.folder / "place.raw", MIB, BEFORE)
    endpoint = lab.endpoint(
        path=path, delay={"read": "200ms"}, filters=["blocksize-policy"], filter_arguments=policy(65536)
    )
    server = lab.start(
        Server(lab.folder, "primary", ["mode=primary", f"state={lab.folder}/s", f"disk={endpoint.uri()}"])
    )
    handle = server.connect()
    expected = bytearray(BEFORE)
    ended: list[int] = []

    def note(error: nbd.Error) -> int:
        ended.append(int(error.value))
        return 1

    for number in range(4):
        data, offset = bytes([number + 1]) * 100, number * 5000 + 77
        expected[offset : offset + 100] = data
        handle.aio_pwrite(data, offset, note)
    expected[30000:50000] = bytes(20000)
    handle.aio_zero(20000, 30000, note)
    drive(handle, lambda: len(ended) == 5)
    assert ended == [0] * 5
    handle.flush()
    assert path.read_bytes() == expected


# -- endpoints that go ----------------------------------------------------------------------------------------


def readable(handle: nbd.NBD, offset: int = 0) -> bool:
    try:
        handle.pread(512, offset)
    except nbd.Error:
        return False
    return True


def primary_on(lab: Lab, uri: str) -> Server:
    """A primary without a secondary, in stage none."""
    return lab.start(Server(lab.folder, "primary", ["mode=primary", f"state={lab.folder}/s1", f"disk={uri}"]))


def test_a_killed_endpoint_of_the_primary_is_the_guests_error_and_comes_back(lab: Lab) -> None:
    path = make_raw(lab.folder / "d.raw", MIB, BEFORE)
    endpoint = lab.qemu_nbd(path)
    secondary = lab.secondary(contents=[BEFORE])
    primary = lab.start(
        Server(
            lab.folder,
            "primary",
            ["mode=primary", f"state={lab.folder}/s1", f"disk={endpoint.uri()}", f"secondary={secondary.uri()}"],
        )
    )
    secondary.start_replication()
    primary.execute("xen-set-replication", enable=True, primary=True)
    handle = primary.connect()
    handle.pwrite(b"a" * 4096, 0)
    handle.flush()
    endpoint.kill()
    for request in (lambda: handle.pread(512, 0), lambda: handle.pwrite(b"b" * 512, 8192), lambda: handle.zero(512, 0)):
        with nbd_refusal(errno.EIO):
            request()
    # Case 1: the guest has been told; nobody else has to be.
    assert primary.status()["error"] is None
    assert secondary.status()["error"] is None
    endpoint.start()
    wait_until(lambda: readable(handle), "the disk is connected again")
    assert handle.pread(4096, 0) == b"a" * 4096
    with contextlib.suppress(nbd.Error):
        handle.flush()  # may say once more that requests were lost
    handle.pwrite(b"c" * 4096, 8192)
    handle.flush()
    assert path.read_bytes()[8192:12288] == b"c" * 4096


def test_after_the_loss_of_unflushed_writes_flush_fails_once(lab: Lab) -> None:
    endpoint = lab.qemu_nbd(make_raw(lab.folder / "d.raw", MIB, BEFORE))
    handle = primary_on(lab, endpoint.uri()).connect()
    handle.pwrite(b"a" * 512, 0)
    endpoint.kill()
    endpoint.start()
    wait_until(lambda: readable(handle), "the disk is connected again")
    with nbd_refusal(errno.EIO):
        handle.flush()
    handle.flush()


def test_after_the_loss_of_flushed_writes_only_flush_succeeds(lab: Lab) -> None:
    endpoint = lab.qemu_nbd(make_raw(lab.folder / "d.raw", MIB, BEFORE))
    handle = primary_on(lab, endpoint.uri()).connect()
    handle.pwrite(b"a" * 512, 0)
    handle.flush()
    endpoint.kill()
    endpoint.start()
    wait_until(lambda: readable(handle), "the disk is connected again")
    handle.flush()


def test_requests_in_flight_end_when_the_endpoint_is_killed(lab: Lab) -> None:
    log = lab.folder / "endpoint.log"
    endpoint = lab.endpoint(
        path=make_raw(lab.folder / "d.raw", MIB),
        filters=["log"],
        delay={"read": "60"},
        filter_arguments=[f"logfile={log}"],
    )
    handle = primary_on(lab, endpoint.uri()).connect()
    errors: list[int] = []

    def ended(error: nbd.Error) -> int:
        errors.append(int(error.value))
        return 1

    buffers = [nbd.Buffer(512) for _ in range(4)]
    for number, buffer in enumerate(buffers):
        handle.aio_pread(buffer, number * 512, ended)
    wait_until(lambda: log.read_text().count(" Read ") >= len(buffers), "the requests are at the endpoint")
    endpoint.kill()
    drive(handle, lambda: len(errors) == len(buffers))
    assert errors == [errno.EIO] * len(buffers)


def test_a_killed_endpoint_of_the_secondary_never_reaches_the_primarys_guest(lab: Lab) -> None:
    path = make_raw(lab.folder / "d.raw", MIB, BEFORE)
    endpoint = lab.qemu_nbd(path)
    mine = make_raw(lab.folder / "mine.raw", MIB, BEFORE)
    here, there = a_pair(lab, str(mine), endpoint.uri())
    guest, standby = here.connect(), there.connect("top0")
    standby.pwrite(b"s" * 4096, 4096)
    endpoint.kill()
    guest.pwrite(b"g" * 4096, 0)  # answered: it is on the primary's own disk
    assert mine.read_bytes()[:4096] == b"g" * 4096
    wait_until(lambda: here.status()["error"], "the primary knows what the secondary lacks")
    assert there.status()["error"]
    assert standby.pread(4096, 4096) == b"s" * 4096  # in active
    with nbd_refusal(errno.EIO):
        standby.pread(4096, 64 * KIB)
    with pytest.raises(QmpError):
        there.execute("xen-colo-do-checkpoint")
    # The disk comes back: what the guest saw at the last checkpoint is all there.
    endpoint.start()
    wait_until(lambda: readable(standby, 64 * KIB), "the disk is connected again")
    expected = bytearray(BEFORE)
    expected[4096:8192] = b"s" * 4096
    assert standby.pread(MIB, 0) == expected
    assert there.status()["stage"] == "running"


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_an_endpoint_that_comes_back_with_another_size_is_not_taken_for_the_disk(lab: Lab, side: str) -> None:
    endpoint = lab.qemu_nbd(make_raw(lab.folder / "d.raw", MIB, BEFORE))
    if side == "primary":
        server = primary_on(lab, endpoint.uri())
        handle = server.connect()
    else:
        arguments = ["mode=secondary", f"state={lab.folder}/s2", f"disk={endpoint.uri()}", "top-id=top0"]
        server = lab.start(Server(lab.folder, "secondary", arguments))
        handle = server.connect("disk0")
    right = endpoint.path
    endpoint.path = make_raw(lab.folder / "other.raw", 2 * MIB)
    endpoint.restart()

    def refused() -> bool:
        with nbd_refusal(errno.EIO):
            handle.pwrite(b"x" * 512, 0)
        return "came back as a different disk" in server.stderr()

    wait_until(refused, "the log says why")
    assert endpoint.path.read_bytes() == bytes(2 * MIB)
    endpoint.path = right
    endpoint.restart()
    wait_until(lambda: readable(handle), "the right disk is connected again")


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EPERM"])
def test_the_endpoints_own_errno_reaches_the_primarys_guest(lab: Lab, name: str) -> None:
    endpoint = lab.endpoint(path=make_raw(lab.folder / "d.raw", MIB, BEFORE), error={"pwrite": name})
    handle = primary_on(lab, endpoint.uri()).connect()
    handle.pwrite(b"a" * 512, 0)
    endpoint.fail()
    with nbd_refusal(getattr(errno, name)):
        handle.pwrite(b"b" * 512, 0)
    endpoint.work()
    handle.pwrite(b"c" * 512, 0)
    assert handle.pread(512, 0) == b"c" * 512


def test_a_full_endpoint_of_the_secondary_is_an_error_of_both_and_not_of_the_guest(lab: Lab) -> None:
    endpoint = lab.endpoint(path=make_raw(lab.folder / "d.raw", MIB, BEFORE), error={"pwrite": "ENOSPC"})
    mine = make_raw(lab.folder / "mine.raw", MIB, BEFORE)
    here, there = a_pair(lab, str(mine), endpoint.uri())
    guest = here.connect()
    endpoint.fail()
    guest.pwrite(b"g" * 4096, 0)
    wait_until(lambda: here.status()["error"], "the primary knows")
    for server in (here, there):
        fault = server.status()["error"]
        assert fault is not None
        assert "No space left" in str(fault)
    assert there.connect("top0").pread(MIB, 0) == BEFORE


# -- endpoints that are none -------------------------------------------------------------------------------------


class Mute:
    """A Unix socket that accepts and says `first`, and never anything more."""

    def __init__(self, path: Path, first: bytes) -> None:
        self.path = path
        self._first = first
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(0.1)
        self._clients: list[socket.socket] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept)

    def _accept(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):  # nobody, or one that has gone again
                client, _ = self._listener.accept()
                client.sendall(self._first)
                self._clients.append(client)

    def __enter__(self) -> Mute:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(DEADLINE_S)
        for client in [*self._clients, self._listener]:
            client.close()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"


GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)


@pytest.mark.parametrize("first", [b"", GREETING], ids=["says nothing", "stops after its greeting"])
def test_a_server_that_never_answers_is_refused_within_a_deadline(lab: Lab, first: bytes) -> None:
    with Mute(lab.folder / "mute", first) as mute:
        begun = time.monotonic()
        _, stderr = lab.failed_start(["mode=primary", f"state={lab.folder}/s", f"disk={mute.uri}"])
        assert time.monotonic() - begun < DEADLINE_S
    assert len(stderr.splitlines()) == 1
    assert f"cannot connect to {mute.uri}: no answer within" in stderr


def test_starting_towards_a_secondary_that_never_answers_fails_within_the_timeout(lab: Lab) -> None:
    with Mute(lab.folder / "mute", GREETING) as mute:
        primary = lab.primary(mute.uri, extra_arguments=["timeout=0.3"])
        with pytest.raises(QmpError, match="no answer within"):
            primary.start_replication()
        assert primary.status()["stage"] == "none"


def test_a_server_that_is_not_nbd_or_not_there_is_refused_by_uri(lab: Lab) -> None:
    with Mute(lab.folder / "mute", b"220 mail.example.org ESMTP\r\n") as mute:
        _, stderr = lab.failed_start(["mode=primary", f"state={lab.folder}/s", f"disk={mute.uri}"])
        assert mute.uri in stderr
        assert len(stderr.splitlines()) == 1
    for uri in (f"nbd+unix:///?socket={lab.folder}/none", "nbd://127.0.0.1:1/", "nbd://[::1", "nbd+unix:///"):
        _, stderr = lab.failed_start(["mode=primary", f"state={lab.folder}/s", f"disk={uri}"])
        assert uri in stderr
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_a_read_only_or_empty_endpoint_and_a_wrong_export_are_refused(lab: Lab, side: str) -> None:
    more = ["top-id=t"] if side == "secondary" else []

    def said(uri: str) -> str:
        _, stderr = lab.failed_start([f"mode={side}", f"state={lab.folder}/s", f"disk={uri}", *more])
        assert uri in stderr
        assert len(stderr.splitlines()) == 1
        return stderr

    path = make_raw(lab.folder / "d.raw", MIB, BEFORE)
    read_only = lab.qemu_nbd(path, name="ro", options=["--read-only"])
    assert "read-only" in said(read_only.uri())
    assert "'bogus'" in said(read_only.uri("bogus"))
    empty = lab.endpoint(size=0, name="empty")
    assert "has no bytes" in said(empty.uri())
    assert path.read_bytes() == BEFORE
