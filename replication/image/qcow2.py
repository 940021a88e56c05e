# SPDX-License-Identifier: BSD-3-Clause
"""The one qcow2 layout that active and hidden disks have (the manual page), made by qemu-img and
checked here.

What the layout gives, and what `open_layout` therefore insists on (field offsets: qcow2 specification,
docs/interop/qcow2.txt of QEMU):

* version 3, 128 KiB clusters, external data file, extended L2 entries, nothing else: no encryption,
  snapshots, compression or dirty flag;
* the L2 tables are all there and lie one after the other, 8192 entries of 16 bytes each;
* the first word of entry k is "guest offset k * 128 KiB, at the same offset of the data file";
* the second word is the state of 32 subclusters of 4 KiB: bit i, allocated; bit 32 + i, reads as zeroes;
  both at once is not permitted.

So only second words ever change, and each change is one aligned 64-bit store.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import subprocess
from typing import NamedTuple

import numpy as np

from replication.disk import files
from replication.disk.lock import lock_for_writing
from replication.errors import ConfigError

CLUSTER = 128 << 10
BLOCK = 4 << 10
BLOCKS_PER_CLUSTER = CLUSTER // BLOCK
SECTOR = 512
"""qcow2 sizes are whole sectors; qemu-img rounds up."""

_OPTIONS = "extended_l2=on,cluster_size=128k,preallocation=metadata,data_file="
_ENTRIES_PER_TABLE = CLUSTER // 16
_BYTES_PER_TABLE = _ENTRIES_PER_TABLE * CLUSTER
_COPIED = 1 << 63
_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 0x44415441
_DIRTY, _CORRUPT, _EXTERNAL_DATA, _EXTENDED_L2 = 1, 2, 4, 16
_REFCOUNT_ORDER = 4
_REFCOUNTS_PER_BLOCK = CLUSTER // 2
_REFCOUNT_CLUSTERS_MAX = 64
"""QEMU's own limit, 8 MiB."""
_CREATE_S = 120
_NAME_MAX = 1023
_TABLES_PER_STEP = 64


class Layout(NamedTuple):
    """What the header of a valid image says."""

    size: int
    backing: str | None
    data_path: str
    table_offset: int
    table_length: int


def default_data_path(path: str) -> str:
    """Where the data of overlay `path` goes: X.qcow2 has X.data beside it."""
    return (path[: -len(".qcow2")] if path.endswith(".qcow2") else path) + ".data"


def image_size(disk_size: int) -> int:
    """The size of a qcow2 image over a disk of `disk_size` bytes."""
    return -(-disk_size // SECTOR) * SECTOR


def create_command(path: str, backing: str, backing_format: str, size: int) -> list[str]:
    """The command that makes an overlay as it has to be."""
    return [
        *("qemu-img", "create", "-q", "-u", "-f", "qcow2"),
        *("-o", _OPTIONS + default_data_path(path).replace(",", ",,")),
        *("-b", backing, "-F", backing_format, path, str(image_size(size))),
    ]


def create(path: str, backing: str, backing_format: str, size: int) -> None:
    """Make an empty overlay of a disk of `size` bytes; it appears under its name complete or not at all."""
    data = default_data_path(path)
    if os.path.exists(data) and os.stat(data).st_blocks:
        raise ConfigError(
            f"{path} does not exist, but its data file {data} does: bring back the one or remove the other"
        )
    temporary = path + ".new"
    # The data file's name comes from the option, so an image made under another name still gets the right one. It is
    # absolute because QEMU looks for a relative one in its working folder, not beside the image.
    command = create_command(path, backing, backing_format, size)
    command[-2] = temporary
    try:
        # qemu-img writes into the file that is there, so this lasts. It also says best why there can be none.
        with contextlib.suppress(OSError):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            files.never_copy_on_write(fd)
            os.close(fd)
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=_CREATE_S,
            stdin=subprocess.DEVNULL,
            umask=0o077,
        )
        os.rename(temporary, path)
        files.sync_folder(path)
    except FileNotFoundError as error:
        raise ConfigError(f"cannot create {path}: qemu-img is not installed") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"qemu-img ended with {error.returncode}"
        raise ConfigError(f"cannot create {path}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"cannot create {path}: qemu-img took more than {_CREATE_S} s") from error
    except OSError as error:
        raise ConfigError(f"cannot create {path}: {error.strerror}") from error
    finally:
        if not os.path.exists(path):
            # Neither a half-made image nor its data file (which had no content before) stays behind. Where they cannot
            # be removed they could not be made either, and what is said is why.
            for name in (temporary, data):
                with contextlib.suppress(OSError):
                    os.unlink(name)


def remove(path: str) -> None:
    """Take back what `create` has made."""
    for name in (path, default_data_path(path)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def open_layout(fd: int, path: str) -> Layout:
    """Lock and check the image open at `fd`; ConfigError says what is wrong with it, nothing is written."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ConfigError(f"{path} is not a regular file, so it cannot be an overlay")
    lock_for_writing(fd, path)
    return _Parser(fd, path).layout()


def read_layout(path: str) -> Layout:
    """Check an image that is not going to be used; ConfigError as `open_layout`, nothing is locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror}") from error
    try:
        return _Parser(fd, path).layout()
    finally:
        os.close(fd)


def check_entries(fd: int, path: str, layout: Layout) -> None:
    """Check every L2 entry of tables that are where `layout` says; ConfigError."""
    _Parser(fd, path).check_entries(layout.table_offset, layout.table_length // CLUSTER, layout.size)


class _Parser:
    """Reads the metadata of one image."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._length = os.fstat(fd).st_size

    def layout(self) -> Layout:
        header = self._read(0, _HEADER.size, "header")
        fields = _HEADER.unpack(header)
        (magic, version, backing_offset, backing_length, cluster_bits, size, encryption, l1_entries, l1_offset) = (
            fields[:9]
        )
        snapshots, incompatible, header_length = fields[11], fields[13], fields[17]
        refcounts_offset, refcounts_clusters, refcount_order = fields[9], fields[10], fields[16]
        if magic != _MAGIC:
            raise ConfigError(f"{self._path} is not a qcow2 image")
        if version == 3 and incompatible & _CORRUPT:
            raise self._corrupt("it is marked as corrupt")
        if version == 3 and incompatible & _DIRTY:
            raise ConfigError(f"{self._path} is marked as dirty: repair it with qemu-img check -r all")
        if (version, incompatible, cluster_bits, encryption, snapshots) != (
            3,
            _EXTERNAL_DATA | _EXTENDED_L2,
            CLUSTER.bit_length() - 1,
            0,
            0,
        ):
            raise self._other_layout()
        if header_length < 104 or header_length > CLUSTER - 8:
            raise self._corrupt(f"header length {header_length}")
        if header_length > _HEADER.size and self._read(_HEADER.size, 1, "header") != b"\0":
            raise self._corrupt("a compression type without its feature bit")
        if fields[12] % CLUSTER or fields[12] >> 63:
            raise self._corrupt(f"a snapshot table at {fields[12]}")
        tables = -(-size // _BYTES_PER_TABLE)
        if not size or size % SECTOR or l1_entries != tables:
            raise self._corrupt(f"{l1_entries} L1 entries for a size of {size} bytes")
        extensions = self._extensions(header_length)
        data_name = extensions.get(_DATA_FILE)
        if not data_name:
            raise self._corrupt("it names no data file")
        table_offset = self._first_table(l1_offset, tables)
        if refcount_order != _REFCOUNT_ORDER:
            raise self._other_layout()
        self._check_refcounts(
            refcounts_offset, refcounts_clusters, [(0, 1), (l1_offset, 8 * tables), (table_offset, tables * CLUSTER)]
        )
        self.check_entries(table_offset, tables, size)
        return Layout(
            size,
            self._backing(backing_offset, backing_length),
            os.path.join(os.path.dirname(self._path), data_name),
            table_offset,
            tables * CLUSTER,
        )

    def _extensions(self, offset: int) -> dict[int, str]:
        found: dict[int, str] = {}
        while offset < CLUSTER:
            kind, length = struct.unpack(">II", self._read(offset, 8, "header extension"))
            if not kind:
                break
            if length > CLUSTER - offset - 8:
                raise self._corrupt(f"a header extension of {length} bytes")
            if kind in (_DATA_FILE, _BACKING_FORMAT):
                found[kind] = self._text(offset + 8, length)
            offset += 8 + -(-length // 8) * 8
        return found

    def _backing(self, offset: int, length: int) -> str | None:
        if not offset:
            return None
        if offset + length > CLUSTER:
            raise self._corrupt("the backing file's name lies outside the header")
        name = self._text(offset, length)
        if "://" in name or name.startswith("json:"):
            return name
        return os.path.join(os.path.dirname(self._path), name)

    def _text(self, offset: int, length: int) -> str:
        if not 0 < length <= _NAME_MAX:
            raise self._corrupt(f"a name of {length} bytes in the header")
        name = self._read(offset, length, "header")
        try:
            if b"\0" not in name:
                return name.decode()
        except UnicodeDecodeError:
            pass
        raise self._corrupt("a name in the header is not text")

    def _first_table(self, l1_offset: int, tables: int) -> int:
        if l1_offset % CLUSTER or not l1_offset:
            raise self._corrupt(f"L1 table at {l1_offset}")
        entries = np.frombuffer(self._read(l1_offset, 8 * tables, "L1 table"), ">u8").astype(np.uint64)
        first = int(entries[0]) & ~_COPIED
        if not first:
            raise self._other_layout()
        expected = np.uint64(_COPIED | first) + np.arange(tables, dtype=np.uint64) * np.uint64(CLUSTER)
        if first % CLUSTER or (entries != expected).any():
            if (entries & np.uint64(_COPIED)).all() and not (entries % np.uint64(CLUSTER)).any():
                raise self._other_layout()
            raise self._corrupt("bad L1 entry")
        if first + tables * CLUSTER > self._length:
            raise self._corrupt(f"truncated to {self._length} bytes, its L2 tables end at {first + tables * CLUSTER}")
        return first

    def _check_refcounts(self, offset: int, clusters: int, used: list[tuple[int, int]]) -> None:
        """Check that every metadata cluster belongs to one thing only: qemu-img calls the image corrupt otherwise, and
        QEMU would put new metadata over it."""
        if offset % CLUSTER or not offset or not 0 < clusters <= _REFCOUNT_CLUSTERS_MAX:
            raise self._corrupt(f"a refcount table of {clusters} clusters at {offset}")
        blocks = np.frombuffer(self._read(offset, clusters * CLUSTER, "refcount table"), ">u8").astype(np.uint64)
        needed = -(-self._length // (CLUSTER * _REFCOUNTS_PER_BLOCK))
        if blocks[needed:].any():
            raise self._corrupt("a refcount block is for clusters beyond its end")
        blocks = blocks[:needed]
        counts = np.zeros(len(blocks) * _REFCOUNTS_PER_BLOCK, np.uint16)
        owners = np.zeros(len(counts), np.uint16)
        used = [*used, (offset, clusters * CLUSTER), *((int(block), CLUSTER) for block in blocks if block)]
        for start, length in used:
            if start % CLUSTER:
                raise self._corrupt(f"a refcount block at {start}")
            if start + length > self._length:
                raise self._corrupt(f"metadata at {start}, which is beyond its end")
            owners[start // CLUSTER : -(-(start + length) // CLUSTER)] += 1
        for index, block in enumerate(blocks):
            if block:
                at = index * _REFCOUNTS_PER_BLOCK
                raw = self._read(int(block), CLUSTER, "refcount block")
                counts[at : at + _REFCOUNTS_PER_BLOCK] = np.frombuffer(raw, ">u2")
        wrong = np.flatnonzero((owners > 1) | ((owners == 1) & (counts != 1)))
        if wrong.size:
            raise self._corrupt(f"cluster {int(wrong[0])} has the reference count {int(counts[wrong[0]])}")

    def check_entries(self, offset: int, tables: int, size: int) -> None:
        """Check every L2 entry, a few tables at a time so that a big image needs little memory."""
        clusters = -(-size // CLUSTER)
        for table in range(0, tables, _TABLES_PER_STEP):
            count = min(_TABLES_PER_STEP, tables - table)
            raw = self._read(offset + table * CLUSTER, count * CLUSTER, "L2 tables")
            entries = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)
            first = table * _ENTRIES_PER_TABLE
            used = entries[: max(0, clusters - first)]
            expected = (np.arange(first, first + len(used), dtype=np.uint64) * np.uint64(CLUSTER)) | np.uint64(_COPIED)
            wrong = np.flatnonzero(used[:, 0] != expected)
            if wrong.size:
                word = int(used[wrong[0], 0])
                if not word:
                    raise self._other_layout()
                raise self._corrupt(f"L2 entry of cluster {first + int(wrong[0])} is {word:#x}")
            if entries[len(used) :].any():
                raise self._corrupt("an L2 entry behind the end of the disk is in use")
            bits = used[:, 1]
            both = np.flatnonzero(bits & (bits >> np.uint64(32)) & np.uint64(0xFFFFFFFF))
            if both.size:
                raise self._corrupt(f"cluster {first + int(both[0])} has blocks that are both data and zero")

    def _read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly `length` bytes, or the error that the image is truncated."""
        if offset + length > self._length:
            raise self._corrupt(f"truncated in its {what}")
        try:
            parts = []
            while length:
                part = os.pread(self._fd, length, offset)
                if not part:
                    raise self._corrupt(f"truncated in its {what}")
                parts.append(part)
                offset += len(part)
                length -= len(part)
            return b"".join(parts)
        except OSError as error:
            raise ConfigError(f"cannot read {self._path}: {error.strerror}") from error

    def _corrupt(self, what: str) -> ConfigError:
        return ConfigError(f"{self._path} is corrupt: {what}; remove it to have it made anew, its content is lost")

    def _other_layout(self) -> ConfigError:
        data = default_data_path(self._path)
        return ConfigError(
            f"{self._path} does not have the layout that overlays need; make it with: qemu-img create -f qcow2 "
            f"-o {_OPTIONS}{data} -b BACKING -F FORMAT {self._path}, or remove it to have it made. What it holds is "
            "lost with that"
        )
