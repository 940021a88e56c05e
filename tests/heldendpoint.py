# SPDX-License-Identifier: BSD-3-Clause
"""A disk behind NBD whose requests a test can hold, one by one."""

from __future__ import annotations

from pathlib import Path

from nbdprocess import NbdProcess
from pausepoints import PausePoints

ENDPOINT = """\
import os, threading, time
import nbdkit

API_VERSION = 2
lock = threading.Lock()

def config(key, value):
    globals()[key] = value

def get_ready():
    global fd
    fd = os.open(path, os.O_RDWR)

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def hold(name):
    held = os.path.join(folder, name + ".hit")
    try:
        os.rename(os.path.join(folder, name), held)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + 30
    while os.path.exists(held) and time.monotonic() < deadline:
        time.sleep(0.002)

def open(readonly):
    return 1

def get_size(h):
    return os.fstat(fd).st_size

def can_multi_conn(h):
    return True

def can_fua(h):
    return nbdkit.FUA_EMULATE

def pread(h, buf, offset, flags):
    hold("pread.before")
    buf[:] = os.pread(fd, len(buf), offset)
    hold("pread.after")

def pwrite(h, buf, offset, flags):
    hold("pwrite.before")
    os.pwrite(fd, buf, offset)

def zero(h, count, offset, flags):
    hold("zero.before")
    os.pwrite(fd, bytes(count), offset)

def trim(h, count, offset, flags):
    zero(h, count, offset, flags)

def flush(h, flags):
    hold("flush.before")

def extents(h, count, offset, flags):
    hold("extents.before")
    found = []
    for at in range(offset, offset + count, 4096):
        length = min(4096, offset + count - at)
        empty = os.pread(fd, length, at) == bytes(length)
        found.append((at, length, nbdkit.EXTENT_ZERO | nbdkit.EXTENT_HOLE if empty else 0))
    return found
"""


class HeldEndpoint(NbdProcess):
    """An NBD server on `path` that holds a request where `points` says: pread.before, pread.after, pwrite.before,
    zero.before, flush.before, extents.before. Requests of one connection run side by side, so they are answered in any
    order."""

    def __init__(self, folder: Path, path: Path, name: str = "held") -> None:
        super().__init__(folder, name)
        self.path = path
        self.points = PausePoints(folder / f"{name}.points")
        self.script = folder / f"{name}.py"
        self.script.write_text(ENDPOINT)

    def command(self) -> list[str]:
        arguments = [f"path={self.path}", f"folder={self.points.folder}"]
        server = ["nbdkit", "-f", "-U", str(self.socket_path), "--exit-with-parent"]
        return [*server, "python", str(self.script), *arguments]
