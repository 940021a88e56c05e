# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes that the product could make with stable storage: each must be noticed by the simulator in a few histories.

Each function breaks the product in this process, for good.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from replication.disk import files
from replication.image.overlay import Overlay
from replication.image.stack import Stack
from replication.image.target import TargetWrites
from replication.record.state import StateFolder
from replication.record.twin import TwinFile
from replication.secondary.disk import SecondaryDisk

_MEANWHILE_S = 0.01
"""Where a mistake shows only when something happens meanwhile, there is time for it."""


def _replace(owner: type, name: str, function: Callable[..., Any]) -> None:
    getattr(owner, name)  # AttributeError: what is broken here is called otherwise now
    setattr(owner, name, function)


def _nothing(*_arguments: object, **_named: object) -> None:
    """Done nothing."""


def hidden_is_not_synced() -> None:
    """The disk is overwritten before what it held is stable in hidden."""
    _replace(TargetWrites, "_preserve_stably", lambda writes, offset, length: writes._preserve(offset, length))


def bits_before_data() -> None:
    """Hidden's bits are published before the data that they speak of is stable."""

    def sync(writes: TargetWrites) -> None:
        writes._hidden.publish(writes._hidden.unpublished())
        writes._hidden.data.flush()

    _replace(TargetWrites, "_sync_hidden", sync)


def data_before_bits_are_taken() -> None:
    """A bit that was set while the data was synced is published with it."""

    def sync(writes: TargetWrites) -> None:
        writes._hidden.data.flush()
        time.sleep(_MEANWHILE_S)
        writes._hidden.publish(writes._hidden.unpublished())

    _replace(TargetWrites, "_sync_hidden", sync)


def flush_forgets_the_disk() -> None:
    """During a commit a flush of the guest face does not cover what went to the disk."""

    def sync(stack: Stack) -> None:
        words = stack.active.unpublished()
        stack.active.data.flush()
        stack.active.publish(words)

    _replace(Stack, "_sync_top", sync)


def checkpoint_forgets_the_disk() -> None:
    """A checkpoint counts what the disk may lose."""
    _replace(TargetWrites, "flush", _nothing)


def checkpoint_ends_before_the_bits_are_gone() -> None:
    """The epoch is complete while the images still hold what was before it."""
    _replace(Stack, "publish_emptied", _nothing)


def checkpoint_is_not_announced() -> None:
    """Bits go before the epoch says that they will."""
    begin, end = StateFolder.begin_epoch, StateFolder.end_epoch

    def late(state: StateFolder, duration_s: float) -> None:
        begin(state)
        end(state, duration_s)

    _replace(StateFolder, "begin_epoch", _nothing)
    _replace(StateFolder, "end_epoch", late)


def done_before_the_disk_is_flushed() -> None:
    """The stage says that the disk alone counts before the disk has it all."""
    _replace(Stack, "flush_committed", _nothing)


def fua_is_a_write() -> None:
    """A guest's FUA is ignored."""
    write = SecondaryDisk.guest_write
    _replace(SecondaryDisk, "guest_write", lambda disk, data, offset, fua: write(disk, data, offset, False))


def killed_process_is_trusted() -> None:
    """What a killed process has left in memory is taken for stable."""
    _replace(Stack, "settle", _nothing)
    _replace(Overlay, "settle", _nothing)


def record_has_no_twin() -> None:
    """The record is overwritten while nothing else says what it was."""

    def write(file: TwinFile, sealed: bytes, _twin: bool) -> None:
        file._overwrite(file._fd, sealed)

    _replace(TwinFile, "_write_in_place", write)


def record_is_not_synced() -> None:
    """A command is answered before its record is stable."""
    _replace(
        TwinFile, "_overwrite", lambda file, fd, sealed: files.pwritev(fd, [sealed.ljust(os.fstat(fd).st_size)], 0)
    )


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        hidden_is_not_synced,
        bits_before_data,
        data_before_bits_are_taken,
        flush_forgets_the_disk,
        checkpoint_forgets_the_disk,
        checkpoint_ends_before_the_bits_are_gone,
        checkpoint_is_not_announced,
        done_before_the_disk_is_flushed,
        fua_is_a_write,
        killed_process_is_trusted,
        record_has_no_twin,
        record_is_not_synced,
    )
}
