# SPDX-License-Identifier: BSD-3-Clause
"""The guest of the secondary."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd

from .filesystem import BLOCK
from .node import Node
from .processes import DemoError, wait_until
from .teller import human_s


@dataclass
class Sample:
    """One request: its times, in seconds since 1970, and whether what it read was right."""

    begun: float
    ended: float
    right: bool = True

    @property
    def latency_s(self) -> float:
        """Seconds from question to answer."""
        return self.ended - self.begun


class Guest:
    """Reads and writes the guest face without a pause, as the guest of the secondary does."""

    def __init__(self, node: Node, expected: Path, blocks: list[int]) -> None:
        """`expected` is the disk at the checkpoint; `blocks` are where it may write."""
        self.reads: list[Sample] = []
        self.writes: list[Sample] = []
        self.written: dict[int, bytes] = {}
        self.failure: str | None = None
        self._expected = expected
        self._blocks = blocks
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, node), daemon=True) for work in (self._read, self._write)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.failure or (self.reads and self.writes), "the guest face answers")

    def stop(self) -> None:
        """End; DemoError if a request failed or read something wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            if thread.is_alive():
                raise DemoError("a request on the guest face was not answered within 30 s")
        if self.failure is not None:
            raise DemoError(f"the guest face: {self.failure}")

    def _guarded(self, work: Callable[[nbd.NBD], None], node: Node) -> None:
        try:
            handle = node.connect("guest")
            work(handle)
            handle.shutdown()
        except nbd.Error as error:
            self.failure = str(error)

    def _read(self, handle: nbd.NBD) -> None:
        dice = random.Random("reads")
        avoid = set(self._blocks)
        with open(self._expected, "rb") as expected:
            count = os.fstat(expected.fileno()).st_size // BLOCK
            while not self._stop.is_set():
                offset = dice.randrange(count) * BLOCK
                if offset in avoid:
                    continue
                begun = time.time()
                data = handle.pread(BLOCK, offset)
                ended = time.time()
                right = bytes(data) == os.pread(expected.fileno(), BLOCK, offset)
                self.reads.append(Sample(begun, ended, right))

    def _write(self, handle: nbd.NBD) -> None:
        dice = random.Random("writes")
        while not self._stop.is_set():
            offset = dice.choice(self._blocks)
            data = dice.randbytes(BLOCK)
            begun = time.time()
            handle.pwrite(data, offset)
            self.writes.append(Sample(begun, time.time()))
            self.written[offset] = data


def latencies(samples: Sequence[Sample]) -> str:
    """How many, the median, and the worst."""
    times = sorted(sample.latency_s for sample in samples)
    return (
        f"{len(times)} answered, median {human_s(times[len(times) // 2])}, "
        f"99 of 100 below {human_s(times[len(times) * 99 // 100])}, slowest {human_s(times[-1])}"
    )
