# SPDX-License-Identifier: BSD-3-Clause
"""Requests for a Connection of the product, as a test gives them to libnbd."""

from __future__ import annotations

import nbd

from replication.disk.connection import Completion, Issue


def reading(buffer: bytearray, offset: int = 0) -> Issue:
    """Fill the buffer."""

    def issue(handle: nbd.NBD, done: Completion) -> None:
        handle.aio_pread(buffer, offset, done)

    return issue


def writing(data: bytes, offset: int = 0) -> Issue:
    """Write the data."""

    def issue(handle: nbd.NBD, done: Completion) -> None:
        handle.aio_pwrite(data, offset, done)

    return issue
