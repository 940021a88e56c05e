# SPDX-License-Identifier: BSD-3-Clause
"""The one qcow2 layout that active and hidden disks have (the manual page), made by qemu-img and
checked here.

What the layout gives, and what `open_layout` therefore insists on (field offsets: qcow2 specification,
docs/interop/qcow2.txt of QEMU):

* version 3, 128 KiB clusters, external data file, extended L2 entries, nothing else: no encryption,
  snapshots, compression or dirty flag;
* the L2 tables are all there and lie one after the other, 8192 entries of 16 bytes each;
* the first word of entry k is "guest offset k * 128 KiB, at the same offset of the data file"; in large tables (see
  FILLED_MAX) it may be 0 while the cluster has no data, so that they may have holes;
* the second word is the state of 32 subclusters of 4 KiB: bit i, allocated; bit 32 + i, reads as zeroes;
  both at once is not permitted.

So second words change, each change is one aligned 64-bit store, and a first word is written once, before the second.

A table of 16 TiB is 2 GiB long. Where it is large it is a hole at first, and no pass is made over what is a hole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replication.disk import files
from replication.disk.lock import lock_for_writing
from replication.errors import ConfigError

CLUSTER = 128 << 10
BLOCK = 4 << 10
BLOCKS_PER_CLUSTER = CLUSTER // BLOCK
SECTOR = 512
"""qcow2 sizes are whole sectors; qemu-img rounds up."""

_PREALLOCATED = "preallocation=metadata,"
_OPTIONS = f"extended_l2=on,cluster_size=128k,{_PREALLOCATED}data_file="
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

PAGE_CLUSTERS = 256
"""Clusters whose entries lie on one page of the tables (4096 / 16): the grain in which it is known what is in them."""

FILLED_MAX = 32 << 20
"""Up to this length (256 GiB of disk) tables have no hole: they are written in a fifth of a second, and then no change
of them ever needs room."""

_PAGE = 4096
_CHECKED_ENTRIES = 1 << 19
"""Entries that are checked together: 8 MiB. A power of two, see `_Entries`."""


class Pages(NamedTuple):
    """What is in each page of the tables (of PAGE_CLUSTERS entries)."""

    whole: bytearray
    """1 where all first words are there, so that second words may be stored."""
    held: bytearray
    """1 where a second word is not 0."""

    def __repr__(self) -> str:
        return f"{sum(self.whole)} of {len(self.whole)} pages whole, {sum(self.held)} held"


class Layout(NamedTuple):
    """What the header of a valid image says."""

    size: int
    backing: str | None
    data_path: str
    table_offset: int
    table_length: int
    pages: Pages


def default_data_path(path: str) -> str:
    """Where the data of overlay `path` goes: X.qcow2 has X.data beside it."""
    return (path[: -len(".qcow2")] if path.endswith(".qcow2") else path) + ".data"


def image_size(disk_size: int) -> int:
    """The size of a qcow2 image over a disk of `disk_size` bytes."""
    return -(-disk_size // SECTOR) * SECTOR


def has_holes(table_length: int) -> bool:
    """Whether tables of that length may have holes."""
    return table_length > FILLED_MAX


def create_command(path: str, backing: str, backing_format: str, size: int, data: str | None = None) -> list[str]:
    """The command that makes an overlay as it has to be."""
    return [
        *("qemu-img", "create", "-q", "-u", "-f", "qcow2"),
        *("-o", _OPTIONS + (default_data_path(path) if data is None else data).replace(",", ",,")),
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
        _make(command, path, temporary, size)
        os.rename(temporary, path)
        files.sync_folder(path)
    except OSError as error:
        raise ConfigError(f"cannot create {path}: {error.strerror}") from error
    finally:
        if not os.path.exists(path):
            # Neither a half-made image nor its data file (which had no content before) stays behind. Where they cannot
            # be removed they could not be made either, and what is said is why.
            for name in (temporary, data):
                with contextlib.suppress(OSError):
                    os.unlink(name)


def create_larger(path: str, layout: Layout, backing_format: str, size: int) -> None:
    """Make an empty image of `size` bytes at `path`, with the backing file and the data file of the one that has that
    layout, whose place it is going to take. ConfigError."""
    data = layout.data_path
    # qemu-img makes the data file anew, so it gets another one, with a name that is as long in the header.
    scratch = data[:-1] + ("~" if data[-1:] != "~" else "#")
    if os.path.lexists(scratch) and os.lstat(scratch).st_blocks:  # one without content is left from a kill
        raise ConfigError(f"cannot create {path}: there is a file {scratch} already")
    made = False
    try:
        assert layout.backing is not None
        _make(create_command(path, layout.backing, backing_format, size, scratch), path, path, size)
        with open(path, "r+b") as image:
            header = image.read(CLUSTER)
            name = scratch.encode()
            if header.count(name) != 1:
                raise ConfigError(f"cannot create {path}: qemu-img has not named its data file as told")
            image.seek(header.index(name))
            image.write(data.encode())
        made = True
    except OSError as error:
        raise ConfigError(f"cannot create {path}: {error.strerror}") from error
    finally:
        for name in (scratch, *(() if made else (path,))):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _make(command: list[str], path: str, temporary: str, size: int) -> None:
    """Have qemu-img make an image of `size` bytes, which is to be `path`, at `temporary`. ConfigError, OSError."""
    sparse = has_holes(-(-size // _BYTES_PER_TABLE) * CLUSTER)
    if sparse:
        command = [part.replace(_PREALLOCATED, "preallocation=off,", 1) for part in command]
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
        if sparse:
            _add_tables(temporary)
    except FileNotFoundError as error:
        raise ConfigError(f"cannot create {path}: qemu-img is not installed") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"qemu-img ended with {error.returncode}"
        raise ConfigError(f"cannot create {path}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"cannot create {path}: qemu-img took more than {_CREATE_S} s") from error


def _add_tables(path: str) -> None:
    """Give an image that qemu-img made without them its L2 tables, as one hole: what they would say is 0 for each
    cluster, "nothing here"."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fields = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        tables, l1_offset, refcounts_offset = fields[7:10]
        first = -(-os.fstat(fd).st_size // CLUSTER)
        # The refcount blocks that are missing, each for 8 GiB of the image, come behind the tables.
        last, blocks = first + tables, 1
        while blocks * _REFCOUNTS_PER_BLOCK < last:
            last, blocks = last + 1, blocks + 1
        addresses = [
            struct.unpack(">Q", os.pread(fd, 8, refcounts_offset))[0],
            *(cluster * CLUSTER for cluster in range(first + tables, last)),
        ]
        parts = [
            (struct.pack(f">{blocks}Q", *addresses), refcounts_offset),
            (struct.pack(f">{tables}Q", *(_COPIED | (first + i) * CLUSTER for i in range(tables))), l1_offset),
        ]
        for number, address in enumerate(addresses):
            begin = max(first, number * _REFCOUNTS_PER_BLOCK)
            end = min(last, (number + 1) * _REFCOUNTS_PER_BLOCK)
            if begin < end:
                parts.append((b"\0\1" * (end - begin), address + begin % _REFCOUNTS_PER_BLOCK * 2))
        os.ftruncate(fd, last * CLUSTER)
        for content, offset in parts:
            if not files.write_all(fd, content, offset):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)


def data_runs(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of a file that are no holes, as (start, stop), in whole pages from `offset` on; OSError."""
    at, end = offset, offset + length
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if start >= end:
            return
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        at = offset + -(-(stop - offset) // _PAGE) * _PAGE
        yield offset + (start - offset) // _PAGE * _PAGE, min(at, end)


def first_words(page: int, size: int) -> npt.NDArray[np.uint64]:
    """The first words of a page of the tables of a disk of `size` bytes, as the file has them."""
    first = page * PAGE_CLUSTERS
    clusters = np.arange(first, max(first, min(first + PAGE_CLUSTERS, -(-size // CLUSTER))), dtype=np.uint64)
    words = np.zeros(PAGE_CLUSTERS, ">u8")
    words[: len(clusters)] = clusters * np.uint64(CLUSTER) | np.uint64(_COPIED)
    return words.view(np.uint64)


GROWN = ".grown"
"""Ends the name of an image that is about to take the place of one that has become too small."""


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


def check_entries(fd: int, path: str, layout: Layout) -> Pages:
    """Check every L2 entry of tables that are where `layout` says, and find out what is in them; ConfigError."""
    return _Parser(fd, path).check_entries(layout.table_offset, layout.table_length // CLUSTER, layout.size)


class _Entries:
    """What the first words of a disk of `clusters` clusters are, in the file's byte order. Nothing is swapped at run
    time: a number in a group of _CHECKED_ENTRIES, and the number of the group, share no bit."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        numbers = np.arange(min(clusters, _CHECKED_ENTRIES), dtype=np.uint64) * np.uint64(CLUSTER)
        self._within = numbers.astype(">u8").view(np.uint64)

    def right(self, words: npt.NDArray[np.uint64], first: int) -> npt.NDArray[np.bool_]:
        """Which of the words of entries from number `first` on are as they should be; all of one group."""
        group, at = divmod(first, _CHECKED_ENTRIES)
        common = (_COPIED | group * _CHECKED_ENTRIES * CLUSTER).to_bytes(8, "big")
        found = np.zeros(len(words), np.bool_)
        used = max(0, min(len(words), self.clusters - first))
        found[:used] = (words[:used] ^ self._within[at : at + used]) == np.uint64(int.from_bytes(common, sys.byteorder))
        return found


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
        pages = self.check_entries(table_offset, tables, size)
        return Layout(
            size,
            self._backing(backing_offset, backing_length),
            os.path.join(os.path.dirname(self._path), data_name),
            table_offset,
            tables * CLUSTER,
            pages,
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

    def check_entries(self, offset: int, tables: int, size: int) -> Pages:
        """Check every L2 entry that is not in a hole, a few at a time so that a big image needs little memory."""
        if offset + tables * CLUSTER > self._length:
            raise self._corrupt("truncated in its L2 tables")
        pages = tables * CLUSTER // _PAGE
        found = Pages(bytearray(pages), bytearray(pages))
        expected = _Entries(-(-size // CLUSTER))
        step = 16 * _CHECKED_ENTRIES
        try:
            for start, stop in data_runs(self._fd, offset, tables * CLUSTER):
                at = start - offset
                while at < stop - offset:
                    end = min(stop - offset, (at // step + 1) * step)
                    raw = self._read(offset + at, end - at, "L2 tables")
                    self._check_some(np.frombuffer(raw, np.uint64).reshape(-1, 2), at // 16, expected, found)
                    at = end
        except OSError as error:
            raise ConfigError(f"cannot read {self._path}: {error.strerror}") from error
        return found

    def _check_some(self, entries: npt.NDArray[np.uint64], first: int, expected: _Entries, found: Pages) -> None:
        """Check the entries of some pages, from number `first` on, and note what is in them."""
        page, pages = first // PAGE_CLUSTERS, len(entries) // PAGE_CLUSTERS
        words, bits = entries[:, 0], entries[:, 1]
        right = expected.right(words, first)
        if right.all():
            found.whole[page : page + pages] = b"\1" * pages
        else:
            self._check_unused(entries, first, expected.clusters, right)
            right |= np.arange(first, first + len(entries)) >= expected.clusters
            found.whole[page : page + pages] = right.reshape(pages, -1).all(axis=1).tobytes()
        if not bits.any():
            return
        found.held[page : page + pages] = (bits.reshape(pages, -1) != 0).any(axis=1).tobytes()
        halves = np.ascontiguousarray(bits).view(np.uint32).reshape(-1, 2)
        both = np.flatnonzero(halves[:, 0] & halves[:, 1])
        if both.size:
            raise self._corrupt(f"cluster {first + int(both[0])} has blocks that are both data and zero")

    def _check_unused(
        self, entries: npt.NDArray[np.uint64], first: int, clusters: int, right: npt.NDArray[np.bool_]
    ) -> None:
        """Refuse what is not as it should be, but for clusters without data, and what is behind the disk's end."""
        used = max(0, min(len(entries), clusters - first))
        if entries[used:].any():
            raise self._corrupt("an L2 entry behind the end of the disk is in use")
        # Bytes as in the file: the zero half, then the data half.
        data = np.ascontiguousarray(entries[:used, 1]).view(np.uint32).reshape(-1, 2)[:, 1]
        unused = (entries[:used, 0] == 0) & (data == 0) if has_holes(16 * clusters) else np.zeros(used, np.bool_)
        wrong = np.flatnonzero(~right[:used] & ~unused)
        if wrong.size:
            word = int(entries[wrong[0], 0].tobytes().hex(), 16)
            if not word:
                raise self._other_layout()
            raise self._corrupt(f"L2 entry of cluster {first + int(wrong[0])} is {word:#x}")

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
