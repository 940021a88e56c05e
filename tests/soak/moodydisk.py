# SPDX-License-Identifier: BSD-3-Clause
"""A disk behind NBD that becomes slow, or fails, when it is told to."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nbdprocess import NbdProcess

ENDPOINT = """\
import ctypes, errno, json, os, random, time
import nbdkit

API_VERSION = 2
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

def config(key, value):
    globals()[key] = value

def get_ready():
    global fd
    fd = os.open(path, os.O_RDWR)

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return 1

def get_size(h):
    return os.fstat(fd).st_size

def can_multi_conn(h):
    return True

def fail(number):
    nbdkit.set_error(number)
    raise OSError(number, os.strerror(number))

def meet(operation):
    file = os.open(mood, os.O_RDONLY)
    try:
        now = json.loads(os.read(file, 4096) or b"{}")
    finally:
        os.close(file)
    if now.get("delay"):
        time.sleep(now["delay"])
    if random.random() < now.get(operation, 0):
        fail(errno.EIO)

def written(data, offset):
    try:
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count
    except OSError as error:
        fail(error.errno)

def pread(h, buf, offset, flags):
    meet("pread")
    buf[:] = os.pread(fd, len(buf), offset)

def pwrite(h, buf, offset, flags):
    meet("pwrite")
    written(bytes(buf), offset)

def zero(h, count, offset, flags):
    meet("pwrite")
    written(bytes(count), offset)

def trim(h, count, offset, flags):
    meet("pwrite")
    if libc.fallocate64(fd, 3, offset, count):
        fail(ctypes.get_errno())

def flush(h, flags):
    meet("flush")
"""


class MoodyDisk(NbdProcess):
    """An NBD server on `path`; nothing that was answered is ever lost, whatever a flush says."""

    def __init__(self, folder: Path, path: Path, name: str) -> None:
        super().__init__(folder, name)
        self.path = path
        self._mood = folder / f"{name}.mood"
        self._script = folder / f"{name}.py"
        self._script.write_text(ENDPOINT)
        self.behave()

    def behave(self, *, delay: float = 0.0, **shares: float) -> None:
        """From now on each request takes `delay` seconds, and these shares of pread, pwrite and flush fail."""
        fresh = self._mood.with_suffix(".new")
        fresh.write_text(json.dumps({"delay": delay, **shares}))
        os.rename(fresh, self._mood)

    def command(self) -> list[str]:
        # Without its lines: a failing disk says so with each request.
        server = ["nbdkit", "-f", "--log=null", "-U", str(self.socket_path), "--exit-with-parent"]
        return [*server, "python", str(self._script), f"path={self.path}", f"mood={self._mood}"]
