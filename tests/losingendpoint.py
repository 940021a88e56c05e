# SPDX-License-Identifier: BSD-3-Clause
"""A disk behind NBD with a cache that loses what it has not been told to keep: when it is killed, and when a flush
fails, which it tells once."""

from __future__ import annotations

from pathlib import Path

from nbdprocess import NbdProcess

ENDPOINT = """\
import os, random, threading
import nbdkit

API_VERSION = 2
GRAIN = 65536
lock = threading.Lock()

def config(key, value):
    globals()[key] = value

def get_ready():
    global fd, now, dirty, chance
    fd = os.open(path, os.O_RDWR)
    now = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
    dirty, chance = set(), random.Random(path)

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return 1

def get_size(h):
    return len(now)

def can_multi_conn(h):
    return True

def can_fua(h):
    return nbdkit.FUA_EMULATE

def pread(h, buf, offset, flags):
    with lock:
        buf[:] = now[offset:offset + len(buf)]

def change(offset, data):
    with lock:
        now[offset:offset + len(data)] = data
        dirty.update(range(offset // GRAIN, (offset + len(data) - 1) // GRAIN + 1))

def pwrite(h, buf, offset, flags):
    change(offset, bytes(buf))

def zero(h, count, offset, flags):
    change(offset, bytes(count))

def trim(h, count, offset, flags):
    change(offset, bytes(count))

def failing():
    try:
        os.unlink(failure)
    except FileNotFoundError:
        return False
    return True

def flush(h, flags):
    with lock:
        fails = failing()
        for grain in dirty:
            at = grain * GRAIN
            if fails and chance.random() < 0.5:
                now[at:at + GRAIN] = os.pread(fd, GRAIN, at)
            else:
                os.pwrite(fd, now[at:at + GRAIN], at)
        dirty.clear()
    if fails:
        nbdkit.set_error(5)
        raise OSError("the flush fails")
"""


class LosingEndpoint(NbdProcess):
    """An NBD server on `path`, a file of whole grains of 64 KiB. `fail_flush` has the next flush fail, and half of what
    it should have kept is gone; a kill loses all that was not flushed."""

    def __init__(self, folder: Path, path: Path, name: str) -> None:
        super().__init__(folder, name)
        self.path = path
        self._failure = folder / f"{name}.failure"
        self.script = folder / f"{name}.py"
        self.script.write_text(ENDPOINT)

    def command(self) -> list[str]:
        arguments = [f"path={self.path}", f"failure={self._failure}"]
        server = ["nbdkit", "-f", "-U", str(self.socket_path), "--exit-with-parent"]
        return [*server, "python", str(self.script), *arguments]

    def fail_flush(self) -> None:
        """The next one."""
        self._failure.touch()

    def work(self) -> bool:
        """Flushes succeed again; whether one has failed since `fail_flush`."""
        failed = not self._failure.exists()
        self._failure.unlink(missing_ok=True)
        return failed
