# SPDX-License-Identifier: BSD-3-Clause
"""Disks that grow while a pair runs: who sees which size when, what is sent, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbd
import pytest

from content import KIB, MIB, make_raw, pattern, qemu_img, whole
from lab import Lab
from nodes import Pair, Primary, QmpError, Secondary, Server, drained, in_sync, refused
from pausepoints import PausePoints
from replication.record.boot import BOOT_ID_ENVIRONMENT
from twins import Twins
from waiting import DEADLINE_S, begin, chance, wait_until

BLOCK = 4 * KIB
GRAIN = 64 * KIB
SIZE = MIB + 5 * BLOCK + 512
"""Neither whole grains nor whole blocks, and in the middle of a cluster of the overlays."""
LARGER = 2 * MIB + 3 * BLOCK + 1024
OLD = pattern(1, SIZE)
NEW = pattern(2, BLOCK)
OURS, THEIRS = pattern(3, LARGER - SIZE), pattern(4, LARGER - SIZE)
"""What is behind the former end, on the primary and on the secondary: nobody has cleared it."""


def grow(path: Path, tail: bytes) -> None:
    """As lvextend does, which gives what another one has left behind."""
    with open(path, "ab") as file:
        file.write(tail)


@pytest.fixture(autouse=True)
def _on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """durability=power refuses tmpfs, which /tmp often is."""
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")


class Bench:
    """A pair that runs, with something in each overlay, whose threads can be held."""

    def __init__(self, lab: Lab, secondary_arguments: tuple[str, ...] = (), **options: Any) -> None:
        # Each in its own folder: the two pass points of the same names.
        self.points = {name: PausePoints(lab.folder / f"pause-{name}") for name in ("primary", "secondary")}
        self.pair: Pair = lab.pair(
            [SIZE],
            contents=[OLD],
            primary_options={"extra_environment": self.points["primary"].environment},
            secondary_options={"extra_environment": self.points["secondary"].environment},
            secondary_arguments=secondary_arguments,
            **options,
        )
        self.primary: Primary = self.pair.primary
        self.secondary: Secondary = self.pair.secondary
        self.pair.start_replication()
        in_sync(self.primary)
        self.primary.checkpoint()
        self.guest = self.primary.connect("disk0")
        # The last checkpoint is OLD; the primary has gone on, also in the last block, and so has the secondary's guest.
        self.guest.pwrite(NEW, BLOCK)
        self.guest.pwrite(b"e" * 512, SIZE - 512)
        in_sync(self.primary)
        self.secondary.connect("top0").pwrite(b"a" * 512, 2 * BLOCK)
        self.checkpointed = OLD[: 2 * BLOCK] + b"a" * 512 + OLD[2 * BLOCK + 512 :]
        self.written = OLD[:BLOCK] + NEW + OLD[2 * BLOCK : SIZE - 512] + b"e" * 512

    def grow_disks(self) -> None:
        grow(self.primary.disks[0], OURS)
        grow(self.secondary.disks[0], THEIRS)

    def resize(self, **arguments: Any) -> dict[str, Any]:
        (disk,) = self.primary.execute("replication-resize", arguments)["disks"]
        return dict(disk)

    def has_grown(self) -> None:
        """Both have the new size and the same content, and so has the secondary's guest after a checkpoint."""
        in_sync(self.primary)
        assert [server.status()["disks"][0]["size"] for server in (self.primary, self.secondary)] == [LARGER, LARGER]
        assert whole(self.primary.connect("disk0")) == self.written + OURS
        assert self.secondary.disks[0].read_bytes() == self.written + OURS
        seen = whole(self.secondary.connect("top0"))
        assert seen[:SIZE] == self.checkpointed
        check_overlays(self.secondary)
        self.primary.checkpoint()
        assert whole(self.secondary.connect("top0")) == self.written + OURS
        self.primary.connect("disk0").pwrite(NEW, LARGER - BLOCK)
        self.primary.checkpoint()
        assert whole(self.secondary.connect("top0")) == (self.written + OURS)[:-BLOCK] + NEW
        assert not self.primary.status()["error"]
        assert not self.secondary.status()["error"]


def check_overlays(secondary: Secondary) -> None:
    """Stock qemu-img has nothing to say against them."""
    for kind in ("active", "hidden"):
        path = secondary.overlay(kind)
        information = json.loads(qemu_img("info", "-U", "--output=json", path))
        assert information["virtual-size"] == -(-LARGER // 512) * 512
        assert information["format-specific"]["data"]["data-file"].endswith(".data")
        qemu_img("check", "-U", path)
        assert not list(path.parent.glob("*.grown*"))


@pytest.fixture
def bench(lab: Lab) -> Bench:
    return Bench(lab)


# -- what everybody sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_pair_grows_while_its_guests_are_there(lab: Lab, durability: str) -> None:
    bench = Bench(lab, (f"durability={durability}",))
    bench.grow_disks()
    assert bench.primary.connect("disk0").get_size() == SIZE
    assert bench.resize() == {
        "name": "disk0",
        "size": LARGER,
        "former-size": SIZE,
        "here-bytes": LARGER,
        "there-bytes": LARGER,
    }
    # Who was there goes on in the size that it knows.
    assert bench.guest.get_size() == SIZE
    assert bench.guest.pread(BLOCK, BLOCK) == NEW
    bench.guest.pwrite(NEW, BLOCK)
    bench.has_grown()
    # The next processes know it.
    for server in (bench.secondary, bench.primary):
        server.kill()
        server.start()
    in_sync(bench.primary)
    bench.written = (bench.written + OURS)[:-BLOCK] + NEW
    assert whole(bench.primary.connect("disk0")) == whole(bench.secondary.connect("top0")) == bench.written
    assert bench.resize()["size"] == LARGER  # nothing to do, and no harm


def test_the_smaller_of_both_disks_counts(bench: Bench) -> None:
    grow(bench.primary.disks[0], OURS)
    unchanged = {"name": "disk0", "size": SIZE, "former-size": SIZE, "here-bytes": LARGER, "there-bytes": SIZE}
    assert bench.resize() == unchanged
    grow(bench.secondary.disks[0], THEIRS + b"x" * MIB)
    assert bench.resize()["there-bytes"] == LARGER + MIB
    bench.secondary.failover()
    assert bench.secondary.status()["disks"][0]["size"] == LARGER


def test_a_disk_grows_step_by_step_to_the_sizes_that_are_given(bench: Bench) -> None:
    bench.grow_disks()
    for size in (SIZE + 512, SIZE + 2 * GRAIN, LARGER):
        assert bench.resize(size=size)["size"] == size
    bench.has_grown()


def test_overlays_grow_over_the_end_of_their_tables(lab: Lab) -> None:
    """A table is of 1 GiB; and an image of more than 256 GiB has holes."""
    bench = Bench(lab)
    for size in (3 * 1024 * MIB, 300 * 1024 * MIB):
        for server in bench.pair.primary, bench.pair.secondary:
            os.truncate(server.disks[0], size)
        assert bench.resize()["size"] == size
        in_sync(bench.primary)
        guest = bench.secondary.connect("top0")
        assert guest.pread(SIZE, 0) == bench.checkpointed
        guest.pwrite(NEW, size - BLOCK)
        for kind in ("active", "hidden"):
            qemu_img("check", "-U", bench.secondary.overlay(kind))
    bench.primary.connect("disk0").pwrite(OLD[:BLOCK], size - BLOCK)
    assert guest.pread(BLOCK, size - BLOCK) == NEW
    bench.primary.checkpoint()
    assert guest.pread(BLOCK, size - BLOCK) == OLD[:BLOCK]


@pytest.mark.parametrize("way", ["another connection", "a restart of nbdkit"])
def test_a_guest_in_qemu_gets_the_new_size(lab: Lab, way: str) -> None:
    """By the steps of docs/operating/everyday.md."""
    bench = Bench(lab)
    qemu = lab.qemu()
    server = {"type": "unix", "path": str(bench.primary.socket_path)}
    resize = {"node-name": "drive0", "size": LARGER}

    def connect(node: str) -> None:
        described = {"driver": "nbd", "node-name": node, "export": "disk0", "server": server, "reconnect-delay": 60}
        qemu.qmp.execute("blockdev-add", described)

    def io(command: str) -> None:
        said = qemu.qmp.execute("human-monitor-command", {"command-line": f'qemu-io drive0 "{command}"'})
        assert "rror" not in said

    def size() -> int:
        nodes = qemu.qmp.execute("query-named-block-nodes", flat=True)
        (drive,) = [node for node in nodes if node["node-name"] == "drive0"]
        return int(drive["image"]["virtual-size"])

    connect("nbd0")
    qemu.qmp.execute("blockdev-add", {"driver": "raw", "node-name": "drive0", "file": "nbd0"})
    bench.grow_disks()
    bench.resize()
    with pytest.raises(QmpError, match="Cannot grow NBD nodes"):
        qemu.qmp.execute("block_resize", resize)
    if way == "another connection":
        connect("nbd1")
        reopened = {"driver": "raw", "node-name": "drive0", "file": "nbd1"}
        qemu.qmp.execute("blockdev-reopen", {"options": [reopened]})
        qemu.qmp.execute("blockdev-del", {"node-name": "nbd0"})
    else:
        bench.primary.terminate()
        bench.primary.start()
        io("read 0 512")  # it connects with the next request
        assert size() == SIZE
    qemu.qmp.execute("block_resize", resize)
    assert size() == LARGER
    io(f"write -P 7 {LARGER - BLOCK} {BLOCK}")
    bench.primary.checkpoint()
    assert bytes(bench.secondary.connect("top0").pread(BLOCK, LARGER - BLOCK)) == b"\7" * BLOCK


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused_has_changed_nothing(bench: Bench) -> None:
    text = refused(bench.primary, "replication-resize", {"size": SIZE - 512})
    assert text == f"disk 'disk0' has {SIZE} bytes: a disk can be grown, and not made smaller"
    assert f"has {SIZE}, grow it" in refused(bench.primary, "replication-resize", {"size": LARGER})
    grow(bench.primary.disks[0], OURS)
    text = refused(bench.primary, "replication-resize", {"size": LARGER})
    assert f"disk 'disk0' cannot have {LARGER} bytes: {bench.secondary.disks[0]} has {SIZE}, grow it" in text
    grow(bench.secondary.disks[0], THEIRS)
    assert "There is no disk 'x'" in refused(bench.primary, "replication-resize", {"disk": "x"})
    assert "resize there" in refused(bench.secondary, "replication-resize")
    bench.secondary.execute("replication-test-start")
    assert "A test of a failover runs ('test')" in refused(bench.primary, "replication-resize")
    bench.secondary.execute("replication-test-stop")
    held = bench.primary.execute("replication-checkpoint", hold=True)["epoch"]
    assert f"Epoch {held} is held" in refused(bench.primary, "replication-resize")
    bench.primary.execute("replication-checkpoint-abort", epoch=held)
    assert [server.status()["disks"][0]["size"] for server in (bench.primary, bench.secondary)] == [SIZE, SIZE]
    assert not list(bench.secondary.state.rglob("*.grown*"))
    assert bench.resize()["size"] == LARGER


def test_a_disk_that_has_shrunk_is_not_resized(bench: Bench) -> None:
    os.truncate(bench.secondary.disks[0], SIZE - 512)
    grow(bench.primary.disks[0], OURS)
    assert bench.resize()["size"] == SIZE
    os.truncate(bench.primary.disks[0], SIZE - 512)
    assert "has shrunk" in refused(bench.primary, "replication-resize")


# -- what goes on meanwhile --------------------------------------------------------------------------------------------


def test_nobody_waits_while_larger_maps_and_overlays_are_made(bench: Bench) -> None:
    """However long their storage takes; and a failover of the secondary comes first."""
    bench.points["secondary"].arm("resize.making")
    bench.points["primary"].arm("resize.mapping")
    bench.grow_disks()
    under_way = begin(bench.resize)
    bench.points["secondary"].wait_hit("resize.making")
    bench.guest.pwrite(NEW, 8 * BLOCK)
    drained(bench.primary)
    assert bench.secondary.connect("top0").pread(BLOCK, 8 * BLOCK) == OLD[8 * BLOCK : 9 * BLOCK]
    bench.points["secondary"].release("resize.making")
    bench.points["primary"].wait_hit("resize.mapping")
    bench.guest.pwrite(NEW, 9 * BLOCK)
    bench.points["primary"].release("resize.mapping")
    assert under_way.result(DEADLINE_S)["size"] == LARGER
    in_sync(bench.primary)
    for server in (bench.primary, bench.secondary):
        os.truncate(server.disks[0], LARGER + MIB)
    bench.points["secondary"].arm("resize.making")
    under_way = begin(bench.resize)
    bench.points["secondary"].wait_hit("resize.making")
    bench.secondary.failover()
    # The second text where the link ends before the answer has come.
    with pytest.raises(QmpError, match=r"a failover has come first|not known whether the secondary has grown"):
        under_way.result(DEADLINE_S)
    bench.points["secondary"].release("resize.making")
    wait_until(lambda: not list(bench.secondary.state.rglob("*.grown*")), "what was made is thrown away")
    assert bench.primary.status()["disks"][0]["size"] == LARGER
    seen = whole(bench.secondary.connect("top0"))
    assert (len(seen), seen[:SIZE]) == (LARGER, bench.checkpointed)


def test_with_fencing_the_guest_waits_for_the_link_that_a_resize_lets_go(lab: Lab) -> None:
    bench = Bench(lab, primary_arguments=["fencing=suspend-io"])
    bench.points["primary"].arm("resize.parted")
    bench.grow_disks()
    under_way = begin(bench.resize)
    bench.points["primary"].wait_hit("resize.parted")
    writing = begin(bench.guest.pwrite, NEW, 8 * BLOCK)
    wait_until(lambda: bench.primary.status()["guest-suspended"], "the guest stands still")
    bench.secondary.kill()
    bench.points["primary"].release("resize.parted")
    assert under_way.result(DEADLINE_S)["size"] == LARGER
    assert bench.primary.status()["guest-suspended"]
    assert not chance(writing)
    bench.secondary.start()
    writing.result(DEADLINE_S)
    bench.written = bench.written[: 8 * BLOCK] + NEW + bench.written[9 * BLOCK :]
    bench.has_grown()


def test_a_comparison_that_runs_ends_and_finds_nothing(lab: Lab) -> None:
    bench = Bench(lab)
    bench.points["primary"].arm("verify.read")
    bench.primary.execute("replication-verify")
    bench.points["primary"].wait_hit("verify.read")
    bench.grow_disks()
    under_way = begin(bench.resize)
    chance(under_way)
    bench.points["primary"].release("verify.read")
    assert under_way.result(DEADLINE_S)["size"] == LARGER
    wait_until(lambda: bench.primary.status()["verify"] is None, "the comparison ends")
    last = bench.primary.status()["last-verify"]
    assert last["different-bytes"] == 0
    bench.has_grown()


def test_what_is_new_takes_no_room_of_hidden(bench: Bench) -> None:
    held = bench.secondary.status()["disks"][0]["hidden-bytes"]
    bench.grow_disks()
    bench.resize()
    in_sync(bench.primary)
    assert bench.secondary.status()["disks"][0]["hidden-bytes"] <= held + 2 * GRAIN  # of the last grain before
    # From here on it is a part of what the next checkpoint replaces.
    bench.primary.connect("disk0").pwrite(NEW, LARGER - 2 * BLOCK)
    drained(bench.primary)
    seen = whole(bench.secondary.connect("top0"))
    behind = -(-SIZE // BLOCK) * BLOCK
    assert seen[behind : -2 * BLOCK] == OURS[behind - SIZE : -2 * BLOCK]


def test_a_guest_whose_requests_are_passed_on_finds_the_new_size(lab: Lab) -> None:
    twins = Twins(lab, "follow-owner=true")
    twins.a.execute("replication-set-role", role="primary")
    twins.joined(twins.a)
    former = twins.b.connect("top0")
    for node in twins.nodes:
        os.truncate(node.disks[0], LARGER)
    assert twins.a.execute("replication-resize")["disks"][0]["size"] == LARGER
    twins.joined(twins.a)
    guest = twins.b.connect("top0")
    assert guest.get_size() == LARGER
    guest.pwrite(NEW, LARGER - BLOCK)
    assert bytes(twins.a.connect("top0").pread(BLOCK, LARGER - BLOCK)) == NEW
    assert former.get_size() == MIB
    former.pwrite(NEW, 0)
    assert bytes(guest.pread(BLOCK, 0)) == NEW


def test_a_pair_that_has_grown_changes_its_roles(lab: Lab) -> None:
    """The overlays of the node that was the owner then are as they were before the disks grew."""
    twins = Twins(lab)
    a, b = twins.a, twins.b
    a.execute("replication-set-role", role="primary")
    twins.joined(a)
    for node in (a, b):
        os.truncate(node.disks[0], LARGER)
    assert a.execute("replication-resize")["disks"][0]["size"] == LARGER
    a.connect("top0").pwrite(NEW, LARGER - BLOCK)
    twins.joined(a)
    a.execute("replication-set-role", role="secondary")
    b.execute("replication-set-role", role="primary")
    twins.joined(b)
    b.connect("top0").pwrite(NEW, LARGER - 2 * BLOCK)
    twins.joined(b)
    for server in (a, b):
        assert server.status()["disks"][0]["size"] == LARGER
    assert whole(a.connect("top0")) == whole(b.connect("top0"))
    assert bytes(a.connect("top0").pread(2 * BLOCK, LARGER - 2 * BLOCK)) == 2 * NEW
    for kind in ("active", "hidden"):
        qemu_img("check", "-U", a.overlay(kind))
    os.truncate(a.disks[0], LARGER + MIB)
    os.truncate(b.disks[0], LARGER + MIB)
    assert b.execute("replication-resize")["disks"][0]["size"] == LARGER + MIB
    twins.joined(b)


def test_an_owner_that_was_a_secondary_grows_and_ends_in_good_order(bench: Bench) -> None:
    bench.primary.kill()
    bench.secondary.failover()
    bench.grow_disks()
    (disk,) = bench.secondary.execute("replication-resize")["disks"]
    assert disk["size"] == LARGER
    bench.secondary.terminate()
    assert json.loads((bench.secondary.state / "state.json").read_text())["clean"] is True
    bench.secondary.start()
    assert bench.secondary.status()["disks"][0]["size"] == LARGER
    assert whole(bench.secondary.connect("top0"))[:SIZE] == bench.checkpointed


# -- interruptions -----------------------------------------------------------------------------------------------------


def interrupted(bench: Bench, server: Server, point: str) -> None:
    """Kill that process when it is at that point of a resize."""
    bench.points[server.name].arm(point)
    bench.grow_disks()
    under_way = begin(bench.resize)
    bench.points[server.name].wait_hit(point)
    server.kill()
    bench.points[server.name].release(point)
    with pytest.raises((QmpError, OSError, EOFError)):
        under_way.result(DEADLINE_S)


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize(
    "point",
    [
        *("secondary: resize.made", "secondary: resize.prepared", "secondary: resize.entered"),
        *("primary: resize.asked", "primary: resize.parted", "primary: resize.prepared", "primary: resize.entered"),
    ],
)
def test_a_kill_costs_nothing_and_the_command_is_given_again(lab: Lab, durability: str, point: str) -> None:
    bench = Bench(lab, (f"durability={durability}",))
    name, _, at = point.partition(": ")
    server = {"primary": bench.primary, "secondary": bench.secondary}[name]
    interrupted(bench, server, at)
    server.start()
    in_sync(bench.primary)  # whatever has grown by now
    bench.guest = bench.primary.connect("disk0")
    bench.guest.pwrite(NEW, BLOCK)
    seen = whole(bench.secondary.connect("top0"))
    assert seen[:SIZE] == bench.checkpointed
    assert bench.resize()["size"] == LARGER
    bench.has_grown()


@pytest.mark.parametrize("point", ["resize.made", "resize.prepared", "resize.entered"])
def test_a_power_cut_leaves_the_last_checkpoint_in_either_size(lab: Lab, point: str) -> None:
    """Of another boot only what is in the images counts, and no word of them that is used while a process runs."""
    bench = Bench(lab, ("durability=power",))
    bench.secondary.connect("top0").flush()
    interrupted(bench, bench.secondary, point)
    for live in bench.secondary.state.rglob("*.live*"):
        live.unlink()
    bench.secondary.extra_environment[BOOT_ID_ENVIRONMENT] = "the next one"
    bench.secondary.start()
    assert whole(bench.secondary.connect("top0"))[:SIZE] == bench.checkpointed
    in_sync(bench.primary)
    assert whole(bench.secondary.connect("top0"))[:SIZE] == bench.checkpointed
    assert bench.resize()["size"] == LARGER
    bench.has_grown()


def test_a_secondary_that_grew_alone_fails_over_and_its_old_primary_follows(bench: Bench) -> None:
    """What is behind the former end of the old primary's disk has never been compared: it is sent."""
    interrupted(bench, bench.primary, "resize.asked")
    assert bench.secondary.status()["disks"][0]["size"] == LARGER
    bench.secondary.failover()
    owner = bench.secondary
    former = Secondary(
        bench.primary.folder, [], name="former", extra_arguments=[f"disk=disk0:{bench.primary.disks[0]}", "top-id=t"]
    )
    former.arguments[1] = f"state={bench.primary.state}"
    former.state = bench.primary.state
    former.start()
    try:
        assert former.status()["disks"][0]["size"] == SIZE
        text = refused(owner, "replication-start", {"mode": "primary", "secondary": former.uri()})
        assert f"disk 'disk0' has {LARGER} bytes there, but {SIZE} here" in text
        (disk,) = former.execute("replication-resize")["disks"]
        assert (disk["size"], disk["there-bytes"]) == (LARGER, None)
        owner.execute("replication-start", mode="primary", secondary=former.uri())
        in_sync(owner)
        owner.execute("replication-checkpoint")
        block = SIZE % BLOCK - BLOCK  # hidden holds the one in which the former end was: the rest of it is zeroes
        assert whole(former.connect("t")) == bench.checkpointed + bytes(-block) + THEIRS[-block:]
        assert bench.primary.disks[0].read_bytes() == owner.disks[0].read_bytes()
    finally:
        former.close()


def test_a_stranger_of_the_new_size_keeps_the_primary_of_the_former_one_not_away(lab: Lab) -> None:
    bench = Bench(lab)
    interrupted(bench, bench.primary, "resize.asked")
    stranger = lab.start(Primary(lab.folder, bench.secondary.uri(), [LARGER], name="stranger"))
    stranger.connect("disk0").pwrite(NEW, 0)
    assert refused(stranger, "replication-start")
    stranger.kill()
    bench.primary.start()
    in_sync(bench.primary)
    assert bench.resize()["size"] == LARGER
    bench.has_grown()


# -- grown disks and older folders -------------------------------------------------------------------------------------


def test_a_node_that_starts_with_a_grown_disk_serves_the_former_size(bench: Bench) -> None:
    for server in (bench.primary, bench.secondary):
        server.kill()
    bench.grow_disks()
    for server in (bench.secondary, bench.primary):
        server.start()
        said = server.stderr()
        assert f"the state folder {server.state} is of the disks 'disk0' of {SIZE} bytes, but these are" in said
        assert "`replctl resize`" in said
        assert server.status()["disks"][0]["size"] == SIZE
    in_sync(bench.primary)
    assert whole(bench.primary.connect("disk0")) == bench.written
    assert bench.secondary.disks[0].read_bytes()[SIZE:] == THEIRS
    assert bench.resize()["size"] == LARGER
    bench.has_grown()


def test_an_owner_grows_alone_and_what_is_new_is_sent_later(bench: Bench) -> None:
    bench.primary.execute("replication-stop")
    bench.grow_disks()
    assert bench.resize()["there-bytes"] is None
    text = refused(bench.primary, "replication-start", {"secondary": bench.secondary.uri()})
    assert f"disk 'disk0' has {LARGER} bytes there, but {SIZE} here" in text
    (disk,) = bench.secondary.execute("replication-resize")["disks"]
    assert disk["size"] == LARGER
    bench.primary.execute("replication-start", secondary=bench.secondary.uri())
    bench.has_grown()


def test_a_disk_behind_nbd_shows_its_new_size_to_the_next_process(lab: Lab) -> None:
    raw = make_raw(lab.folder / "there.raw", SIZE, OLD)
    endpoint = lab.qemu_nbd(raw)
    arguments = ["mode=secondary", f"state={lab.folder}/s", f"disk=disk0:{endpoint.uri()}", "top-id=top0"]
    secondary = lab.start(Server(lab.folder, "secondary", arguments))
    secondary.execute("replication-start")
    assert secondary.connect("top0").get_size() == SIZE
    secondary.terminate()
    endpoint.close()
    os.truncate(raw, LARGER)
    endpoint.start()
    secondary.start()
    assert secondary.connect("top0").get_size() == SIZE // 512 * 512
    (disk,) = secondary.execute("replication-resize")["disks"]
    assert disk["size"] == LARGER
    handle: nbd.NBD = secondary.connect("top0")
    assert handle.pread(SIZE, 0) == OLD
    wait_until(lambda: secondary.status()["stage"] == "running", "it runs")
