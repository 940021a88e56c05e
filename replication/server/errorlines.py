# SPDX-License-Identifier: BSD-3-Clause
"""The lines that nbdkit's Python module prints, one for each callback that raises: they go through our log (log.py).

nbdkit gives a callback no way to fail without a line (errors.c of its Python module calls `nbdkit_error` for every
exception), and writes it with the GIL held. So a client whose requests are refused fills the log with 2,500 lines a
second, and where nobody reads the log, a pipe that is full stops every thread of the process with the first request
that fails.

The module's call goes through a slot of its own (the GLOB_DAT or JUMP_SLOT relocation of `nbdkit_error`), which leads
here from `install` on. Where the slot is not found, all stays as nbdkit does it.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Hashable
from typing import Any

MODULE = "nbdkit-python"
"""What the name of nbdkit's Python module begins with."""

_DYNAMIC = struct.Struct("=qQ")
_RELOCATION = struct.Struct("=QQq")
_SYMBOL_BYTES = 24
_STRTAB, _SYMTAB, _RELA, _RELASZ, _PLTRELSZ, _JMPREL = 5, 6, 7, 8, 2, 23
"""Tags of the dynamic section (elf(5), 64 bits)."""

_POINTER_BYTES = 8
_RTLD_NOLOAD, _RTLD_LAZY = 4, 1
_PROT_READ, _PROT_WRITE = 1, 2

_Error = ctypes.CFUNCTYPE(None, *([ctypes.c_void_p] * 6))
"""`nbdkit_error`: the format, and as many arguments as registers hold: the module passes three at most, pointers."""

_FORMAT = b"%s: %s: error: %s"


class ErrorLines:
    """Stands in for `nbdkit_error` in nbdkit's Python module."""

    def __init__(self, put: Callable[[str, Hashable, str], None]) -> None:
        """`put(text, kind, name)` takes a line."""
        self._put = put
        self.kind: Hashable = None
        """Of the exception that has been formatted last: the GIL is held from there until its line comes here."""
        self.direct = False
        """Leave it to nbdkit, which since 1.42 sends the client what it prints for it."""
        self._real: Any = None
        self._stand_in = _Error(self._error)

    def install(self) -> bool:
        """Take the slot over; whether there is one."""
        if struct.calcsize("P") != _POINTER_BYTES:
            return False
        try:
            self._real = ctypes.CDLL(None).nbdkit_error
        except AttributeError:
            return False
        self._real.restype = None
        self._real.argtypes = [ctypes.c_void_p] * 6
        path = _module_path()
        slot = None if path is None else _slot(path, b"nbdkit_error")
        if slot is None:
            return False
        _make_writable(slot)
        target = ctypes.cast(self._stand_in, ctypes.c_void_p).value
        ctypes.c_void_p.from_address(slot).value = target
        return True

    def _error(self, *arguments: int | None) -> None:
        kind, self.kind = self.kind, None
        direct, self.direct = self.direct, False
        if direct or arguments[0] is None or ctypes.string_at(arguments[0]) != _FORMAT or None in arguments[1:4]:
            self._real(*arguments)
            return
        script, callback, text = (ctypes.string_at(at or 0).decode(errors="replace") for at in arguments[1:4])
        self._put(f"{script}: {callback}: error: {text}", (callback, kind), f"failed {callback}")


def _module_path() -> str | None:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if path.rpartition("/")[2].startswith(MODULE):
                return f"/{path}"
    return None


class _LinkMap(ctypes.Structure):
    """The public part of glibc's struct link_map (link.h), which a handle of dlopen(3) points to."""

    _fields_ = (("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_void_p))


def _slot(path: str, symbol: bytes) -> int | None:
    """The address of the pointer through which the loaded object calls the function, None if it does not call it so."""
    try:
        handle = ctypes.CDLL(path, mode=_RTLD_NOLOAD | _RTLD_LAZY)._handle
    except OSError:
        return None
    loaded = _LinkMap.from_address(handle)
    base = loaded.base or 0
    tags: dict[int, int] = {}
    at = loaded.dynamic or 0
    while True:
        tag, value = _DYNAMIC.unpack(ctypes.string_at(at, _DYNAMIC.size))
        if not tag:
            break
        tags.setdefault(tag, value)
        at += _DYNAMIC.size
    addresses = {tag: tags[tag] for tag in (_STRTAB, _SYMTAB, _RELA, _JMPREL) if tag in tags}
    # glibc has made them absolute, but where the section is read-only.
    addresses = {tag: address if address >= base else base + address for tag, address in addresses.items()}
    for table, size in ((_JMPREL, _PLTRELSZ), (_RELA, _RELASZ)):
        for start in range(0, tags.get(size, 0) if table in addresses else 0, _RELOCATION.size):
            entry = ctypes.string_at(addresses[table] + start, _RELOCATION.size)
            offset, info, addend = _RELOCATION.unpack(entry)
            if info >> 32 and not addend:
                name = ctypes.c_uint32.from_address(addresses[_SYMTAB] + (info >> 32) * _SYMBOL_BYTES).value
                if ctypes.string_at(addresses[_STRTAB] + name) == symbol:
                    return int(base + offset)
    return None


def _make_writable(slot: int) -> None:
    """A module that was linked to be bound at once keeps its slots read-only."""
    page = slot - slot % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mprotect(page, mmap.PAGESIZE, _PROT_READ | _PROT_WRITE)
