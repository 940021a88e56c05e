# SPDX-License-Identifier: BSD-3-Clause
"""The steps of the demonstration, in their order, and what has to hold after each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nbd

from .filesystem import (
    BLOCK,
    GUEST_FILE,
    GUEST_FILE_BYTES,
    Changes,
    collect_files,
    differences,
    file_blocks,
    first_changes,
    first_difference,
    image_tree,
    read_tree,
    second_changes,
)
from .guest import Guest, latencies
from .node import ROOT, Node, StageWatch
from .processes import STEP_S, DemoError, Processes, end, run
from .teller import MIB, Teller, human, human_s
from .writing import can_mount, difference_image, mounted

INODE_BYTES = 256

SLACK_BYTES = 24 * MIB
"""Journal, bitmaps, and the blocks that large files and folders need for their own lists."""


class Demo:
    """The steps, in their order."""

    def __init__(self, teller: Teller, processes: Processes, folder: Path, size: int, writer: str) -> None:
        self.teller = teller
        self.processes = processes
        self.folder = folder
        self.size = size
        self.mount = writer == "mount" or (writer == "auto" and can_mount())
        self.primary_disk = folder / "primary.img"
        self.secondary_disk = folder / "secondary.img"
        self.checkpoint_disk = folder / "checkpoint.img"
        self.bad = 0

    def run(self) -> bool:
        """All of it; whether every check held."""
        self.make_disks()
        self.start_pair()
        self.change()
        self.take_checkpoint()
        self.kill_primary()
        self.fail_over()
        self.inspect()
        return not self.bad

    def check(self, holds: bool, text: str, otherwise: str) -> None:
        """One check, for people."""
        if holds:
            self.teller.held(text)
        else:
            self.bad += 1
            self.teller.failed(otherwise)

    def make_disks(self) -> None:
        self.teller.step("A file system on the primary disk")
        files = self.folder / "files"
        files.mkdir()
        size = collect_files(files, self.size)
        if size < self.size // 2:
            raise DemoError(f"this machine has only {human(size)} of files to use: try --size {size // MIB}M")
        tree = read_tree(files)
        # Little more room than the first changes and the file system's own tables need, so that the second changes
        # overwrite what was there: data, and not free space, is what copy-before-write has to keep.
        blocks = sum(-(-entry.size // BLOCK) + (entry.kind == "folder") for entry in tree.values())
        image_size = (
            (blocks * BLOCK + len(tree) * INODE_BYTES + size // 8 + GUEST_FILE_BYTES + SLACK_BYTES) // MIB * MIB
        )
        with open(self.primary_disk, "wb") as file:
            file.truncate(image_size)
        shape = ("-b", str(BLOCK), "-I", str(INODE_BYTES), "-N", str(len(tree) + 100), "-J", "size=4", "-m", "0")
        run("mke2fs", "-q", "-F", "-t", "ext4", *shape, "-L", "demo", "-d", files, self.primary_disk)
        shutil.rmtree(files)
        self.teller.fact(f"ext4 of {human(image_size)} with {len(tree)} real files and folders, {human(size)}")
        run("cp", "--sparse=always", self.primary_disk, self.secondary_disk)
        self.teller.fact("copied to the secondary disk: a pair starts from two equal disks")

    def start_pair(self) -> None:
        self.teller.step("The pair")
        self.secondary = Node(self.processes, self.folder, "secondary", f"disk={self.secondary_disk}", "top-id=guest")
        self.primary = Node(
            self.processes, self.folder, "primary", f"disk={self.primary_disk}", f"secondary={self.secondary.uri()}"
        )
        # The secondary first: from its start on it keeps what the primary overwrites.
        self.teller.fact(f"secondary: nbdkit, process {self.secondary.process.pid}: {self.secondary.replctl('start')}")
        self.teller.fact(f"primary: nbdkit, process {self.primary.process.pid}: {self.primary.replctl('start')}")

    def change(self) -> None:
        tree = image_tree(self.primary_disk, self.folder / "tree")
        changes = first_changes(tree, self.folder / "first", self.size)
        begun = time.monotonic()
        if self.mount:
            self.teller.step("Changes to files, on the file system mounted over NBD (nbdfuse, loop device)")
            with mounted(self.processes, self.primary, self.folder) as mount:
                changes.by_mount(mount)
            self.teller.fact("unmounted, so the file system is complete on the disk")
        else:
            self.teller.step("Changes to files (debugfs on a copy, and qemu-img commit of the difference over NBD)")
            self.write_by_qemu(changes)
            self.teller.fact("the file system is complete on the disk")
        self.teller.fact(
            f"{len(changes.write)} files written, {len(changes.remove)} removed, {human(changes.write_bytes)}, "
            f"in {human_s(time.monotonic() - begun)}"
        )

    def write_by_qemu(self, changes: Changes) -> None:
        wanted = self.folder / "wanted.img"
        run("cp", "--sparse=always", self.primary_disk, wanted)
        changes.by_debugfs(wanted, self.folder / "script")
        run("qemu-img", "commit", "-q", difference_image(self.folder, wanted, self.primary))
        wanted.unlink()

    def take_checkpoint(self) -> None:
        self.teller.step("Checkpoint (nothing writes meanwhile)")
        # Asked of the primary, which has the secondary take it when everything up to this instant has arrived there.
        self.teller.fact(f"of the pair: {self.primary.replctl('checkpoint')}")
        run("cp", "--sparse=always", self.primary_disk, self.checkpoint_disk)
        run("e2fsck", "-fn", self.checkpoint_disk)
        self.tree = image_tree(self.checkpoint_disk, self.folder / "tree")
        self.teller.fact(f"noted for later: {len(self.tree)} files and folders, each with its SHA-256")

    def kill_primary(self) -> None:
        self.teller.step("More changes on the primary, and SIGKILL in their midst")
        wanted = self.folder / "wanted.img"
        run("cp", "--sparse=always", self.primary_disk, wanted)
        changes = second_changes(self.tree, self.folder / "second", self.size)
        changes.by_debugfs(wanted, self.folder / "script")
        image = difference_image(self.folder, wanted, self.primary)
        before = self.primary.disk()["totals"]
        # Half of it has to be on the secondary, so that there is something to roll back.
        enough = before["forwarded"] + changes.write_bytes // 2
        begun = time.monotonic()
        writer = self.processes.start(("qemu-img", "commit", "-q", "-d", image), self.folder / "commit.log")
        now = self.await_forwarded(enough)
        self.primary.process.send_signal(signal.SIGKILL)
        self.primary.process.wait(10)
        took_s = time.monotonic() - begun
        writer.wait(STEP_S)
        self.teller.fact(
            f"{len(changes.remove)} files removed and {human(changes.write_bytes)} written over them, "
            f"in {human_s(took_s)}: {human(now['written'] - before['written'])} were answered and "
            f"{human(now['forwarded'] - before['forwarded'])} on the secondary when process {self.primary.process.pid} "
            "was killed"
        )
        self.teller.fact(f"the writer, qemu-img, {'met an error' if writer.returncode else 'had just ended'}")
        disk = self.secondary.disk()
        self.teller.fact(
            f"the hidden disk of the secondary holds {human(disk['hidden-bytes'])} of what was overwritten"
        )
        self.check(
            first_difference(self.secondary_disk, self.checkpoint_disk) is not None and disk["hidden-bytes"] > 0,
            "the secondary disk itself is past the checkpoint",
            "the changes after the checkpoint did not reach the secondary disk: there is nothing to roll back",
        )

    def await_forwarded(self, count: int) -> dict[str, int]:
        """Watch the primary until it has forwarded `count` bytes in total; its totals then."""
        command = (ROOT / "scripts" / "replctl", "--state", self.primary.state, "status", "--json", "--watch", "0.01")
        watch = self.processes.start(command, self.folder / "watch.log", stdout=subprocess.PIPE)
        deadline = time.monotonic() + STEP_S
        assert watch.stdout is not None
        for line in watch.stdout:
            totals: dict[str, int] = json.loads(line)["disks"][0]["totals"]
            if totals["forwarded"] >= count or time.monotonic() > deadline:
                end(watch)
                return totals
        raise DemoError(f"the primary ended with {self.primary.process.poll()}: {self.primary.said()}")

    def fail_over(self) -> None:
        self.teller.step("Failover, with a guest at work on the guest face")
        blocks = file_blocks(self.checkpoint_disk, GUEST_FILE)
        guest = Guest(self.secondary, self.checkpoint_disk, blocks)
        guest.start()
        held = self.secondary.disk()["hidden-bytes"]
        watch = StageWatch(self.secondary.state / "control.sock")
        self.secondary.replctl("failover", "--yes")
        _, begun = watch.next()
        stage, done = watch.next()
        watch.close()
        if stage != "done":
            raise DemoError(f"the commit failed: {self.secondary.status()['error']}")
        guest.stop()
        self.teller.fact(
            f"commit of {human(held)} from the hidden disk, and the guest's writes, into the secondary disk: "
            f"{human_s(done - begun)}"
        )
        for what, samples in (("reads", guest.reads), ("writes", guest.writes)):
            during = [sample for sample in samples if sample.begun > begun and sample.ended < done]
            self.check(
                bool(during),
                f"{what} of {BLOCK // 1024} KiB during the commit: {latencies(during) if during else ''}",
                f"no {what} were answered during the commit",
            )
        wrong = sum(not sample.right for sample in guest.reads)
        self.check(
            not wrong,
            f"all {len(guest.reads)} reads, before, during and after, got the content of the checkpoint",
            f"{wrong} of {len(guest.reads)} reads got something else than the content of the checkpoint",
        )
        self.expect_writes(guest.written, blocks)
        self.check(self.refused(), "a write to the target face is refused now", "the target face still takes writes")

    def expect_writes(self, written: dict[int, bytes], blocks: list[int]) -> None:
        """Put the guest's writes into the copy of the checkpoint, and what they make of the file into the tree."""
        digest = hashlib.sha256()
        with open(self.checkpoint_disk, "r+b") as file:
            for offset, data in written.items():
                os.pwrite(file.fileno(), data, offset)
            for offset in blocks:
                digest.update(os.pread(file.fileno(), BLOCK, offset))
        self.tree[GUEST_FILE] = self.tree[GUEST_FILE]._replace(content=digest.hexdigest())

    def refused(self) -> bool:
        """What the old primary meets if it comes back."""
        handle = self.secondary.connect("disk0")
        try:
            handle.pwrite(bytes(BLOCK), 0)
        except nbd.Error as error:
            return bool(error.errno == "ESHUTDOWN")
        return False

    def inspect(self) -> None:
        self.teller.step("The secondary disk on its own")
        end(self.secondary.process)
        if self.secondary.process.returncode != 0:
            raise DemoError(f"the secondary ended with {self.secondary.process.returncode}: {self.secondary.said()}")
        checked = subprocess.run(
            ("e2fsck", "-fn", self.secondary_disk), capture_output=True, text=True, timeout=STEP_S, check=False
        )
        self.check(checked.returncode == 0, "e2fsck -fn finds nothing", f"e2fsck -fn: {checked.stdout.strip()[-2000:]}")
        found = image_tree(self.secondary_disk, self.folder / "tree")
        wrong = differences(self.tree, found)
        count = sum(entry.size for entry in found.values())
        self.check(
            not wrong,
            f"all {len(found)} files and folders, {human(count)}, are as at the checkpoint "
            f"({GUEST_FILE}: as the guest of the secondary wrote it)",
            f"{len(wrong)} files differ from the checkpoint: {'; '.join(wrong[:5])}",
        )
        offset = first_difference(self.checkpoint_disk, self.secondary_disk)
        self.check(
            offset is None,
            f"and so is every byte of the disk, {human(self.secondary_disk.stat().st_size)}",
            f"the disk differs from the checkpoint at offset {offset}",
        )
