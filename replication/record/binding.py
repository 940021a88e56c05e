# SPDX-License-Identifier: BSD-3-Clause
"""What binds the files of a state folder together, so that none of them is believed beside others that it is not of.

The epoch page, the record and every map carry the same two numbers: the identity of the folder, drawn at random, and
the number of the opening, which grows by one with each process. The page also has the serial of the record that was
saved last, which maps there are, and whether the folder was closed in good order; then the maps were, too.

    BARE      version 0.2, a new folder, or the first opening was not completed: what is there is adopted, once
       | bind
    BOUND     a file that is missing, empty, cut off, of another folder or of another opening is not believed
       | bind, by each process: the page says which number comes next, the record is saved with it, the maps are sealed
       | with it, the page takes it. Until then both numbers, and those in between, are believed: a kill anywhere, or
       | a file system that is full, costs nothing.
    BOUND

What is not believed means that everything may differ:

    a map        all of it is marked (the account of what is unflushed: everything may be)
    the record   all maps are marked; the sides say what else (PrimarySide.open, SecondarySide.open)
    the page     the same

Not noticed: a copy that was made while the process ran, put back after that very process was killed. (After one that
has ended in good order it is.) And a folder that was put back as a whole is what it was.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from replication.errors import ReplicationError
from replication.log import log
from replication.record.boot import boot_id
from replication.record.grainfile import Found, GrainFile, Seal

IDENTITY, OPENING, NEXT, CLOSED, SERIAL = 8, 9, 10, 11, 12
"""Words of the epoch page: the identity, the number of the opening, the one that is being bound (0: none), whether the
folder was closed in good order, and the serial of the record."""
_REGISTER, _REGISTER_END = 256, 512
"""Words of the epoch page in which four bits stand for each map. Two names hardly ever have the same four; then a map
that never was is taken for one that is missing."""

_OPENING_MAX = 1 << 60


class Page(Protocol):
    """The words of the epoch page."""

    def word(self, index: int) -> int:
        """What it is."""

    def write_words(self, index: int, *values: int) -> None:
        """Write some; StateError."""

    def put_if_room(self, index: int, *values: int) -> None:
        """Store some, as far as the file system allows."""

    def flush_page(self) -> None:
        """Make them stable; StateError."""


class Bound(Protocol):
    """What of the record concerns the binding (state.Record)."""

    identity: str
    opens: int
    boot: str | None


class Doubts(NamedTuple):
    """What was not believed, and why."""

    folder: str | None
    """The record or the page."""
    maps: dict[tuple[str, str], str]
    """By disk name and kind."""
    record: bool = False
    """The record itself is not believed, so it may not know of writes that nobody has allowed to lose."""

    def of(self, disk: str, *kinds: str) -> str | None:
        """Why a disk is concerned, by the folder or its maps of these kinds; None if it is not."""
        found = (self.maps.get((disk, kind)) for kind in kinds)
        return self.folder or next((why for why in found if why is not None), None)


def _bits(name: str) -> Iterable[tuple[int, int]]:
    """(word, bit) of those that stand for a map."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    for at in range(0, 8, 2):
        number = int.from_bytes(digest[at : at + 2], "little") % (64 * (_REGISTER_END - _REGISTER))
        yield _REGISTER + number // 64, 1 << number % 64


class Binding:
    """The binding of one state folder. Opening and binding come one at a time."""

    def __init__(self, page: Page) -> None:
        self._page = page
        # The maps that this process has opened last, by name. Who uses one closes it.
        self._files: dict[str, GrainFile] = {}
        # All that was there has been bound to this process, or that was tried.
        self._ready = False
        # A record of version 0.2: its maps were there, but for the account of what is unflushed.
        self._former = False
        # The page is not believed, so it says nothing of the maps.
        self._page_doubted = False
        self._doubts = Doubts(None, {})
        self._doubted = False

    @property
    def _bare(self) -> bool:
        """Nothing is bound yet, so nothing that is missing need have been there."""
        return not self._page.word(OPENING)

    # -- what is believed ----------------------------------------------------------------------------------

    def examine(self, record: Bound | None, serial: int) -> None:
        """The record was read; `serial` is its number."""
        word = self._page.word
        identity, opening = word(IDENTITY), word(OPENING)
        if record is None:
            if word(SERIAL):
                self._doubt("state.json is missing", record=True)
            return
        own = int(record.identity or "0", 16)
        if self._bare and own in (0, identity):
            self._former = not own
        elif not identity or self._bare:
            self._doubt("epoch is missing, empty or of another state folder", page=True)
        elif own != identity:
            self._doubt(
                "state.json and epoch are of different state folders" if own else _OLDER, record=True, page=True
            )
        elif record.opens > max(opening, word(NEXT)) or (record.boot == boot_id() and serial > word(SERIAL) + 1):
            self._doubt("epoch is an older copy than state.json", page=True)
        elif record.opens < opening or serial < word(SERIAL):
            self._doubt(_OLDER, record=True)

    def _doubt(self, why: str, *, record: bool = False, page: bool = False) -> None:
        log(f"{why}: everything may differ")
        self._doubts = self._doubts._replace(folder=why, record=record)
        self._page_doubted = page
        self._doubted = True

    def take_doubts(self) -> Doubts:
        """What was not believed since the last call; whoever takes it marks what may differ."""
        doubts, self._doubts = self._doubts, Doubts(None, {})
        return doubts

    def open(self, path: str, disk: str, kind: str, count: int, doubtful: int) -> GrainFile:
        """The map of that kind of a disk, of `count` grains: as it was left, empty where there was none, and all
        `doubtful` where it is not believed. ConfigError."""
        name = f"{disk}.{kind}"
        file = GrainFile(path, count)
        try:
            why = self._why_not(file.found, name, kind)
            if why is not None:
                log(f"{path} {why}: everything may differ")
                self._doubts.maps[disk, kind] = f"{path} {why}"
                self._doubted = True
            fresh = file.found is Found.NOTHING or not self._is_known(name)
            file.map(doubtful if why is not None else 0 if fresh else None)
        except BaseException:
            file.close()
            raise
        self._files[name] = file
        return file

    def _is_known(self, name: str) -> bool:
        return self._bare or all(self._page.word(at) & bit for at, bit in _bits(name))

    def _why_not(self, found: Found | Seal, name: str, kind: str) -> str | None:
        """Why a map is not believed, None if it is."""
        word = self._page.word
        if self._page_doubted or found is Found.DISTRUSTED:
            return str(found.value) if isinstance(found, Found) else "belongs to what is not believed"
        if self._bare:
            if found is Found.NOTHING:
                return str(found.value) if self._former and kind != "unflushed" else None
            if found is Found.OTHER:
                return str(found.value)
            known = found is Found.BARE or (isinstance(found, Seal) and found.identity in (0, word(IDENTITY)))
            return None if known else "is of another state folder"
        if not self._is_known(name):
            return None
        if isinstance(found, Found):
            return str(found.value)
        if found.identity != word(IDENTITY):
            return "is of another state folder"
        in_turn = word(OPENING) <= found.opening <= max(word(OPENING), word(NEXT))
        return None if in_turn and (found.closed or not word(CLOSED)) else "is an older copy"

    # -- binding -------------------------------------------------------------------------------------------

    @property
    def doubted(self) -> bool:
        """Whether something was not believed since the last binding."""
        return self._doubted

    def bind(self, record: Bound, save: Callable[[], int], needed: bool) -> None:
        """From here on all files are this process's. `save()` saves the record, and returns its serial, 0 when that was
        not necessary. StateError when the record is `needed` or says what was not believed, and cannot be saved."""
        page = self._page
        needed = needed or self._doubted
        self._ready = True
        try:
            identity, opening = self._announce()
            self._register(dict.fromkeys(range(_REGISTER, _REGISTER_END), 0) if self._bare else None)
        except ReplicationError as error:
            if not all(map(self._is_known, self._files)):
                raise  # the next process would take the new ones for something to be made anew
            self._leave(error)
            if needed:
                save()
            return
        record.identity, record.opens = f"{identity:016x}", opening
        try:
            serial = save()
            for file in self._files.values():
                file.seal(Seal(identity, opening))
            self._register(dict.fromkeys(range(_REGISTER, _REGISTER_END), 0))
            page.write_words(SERIAL, serial)
            page.write_words(OPENING, opening)
            page.write_words(NEXT, 0)
            page.flush_page()
        except OSError as error:
            self._leave(error)
        except ReplicationError as error:
            if needed:
                raise
            self._leave(error)
        else:
            self._former = self._page_doubted = self._doubted = False

    def _announce(self) -> tuple[int, int]:
        """Have the page say which number comes next; it and the identity. StateError."""
        page = self._page
        identity = page.word(IDENTITY)
        if self._page_doubted or not identity or max(page.word(OPENING), page.word(NEXT)) > _OPENING_MAX:
            identity = secrets.randbelow((1 << 64) - 1) + 1
            page.write_words(OPENING, 0)
            page.write_words(NEXT, 0)
            page.write_words(IDENTITY, identity)
        opening = max(page.word(OPENING), page.word(NEXT)) + 1
        page.write_words(NEXT, opening)
        page.write_words(CLOSED, 0)
        page.flush_page()
        return identity, opening

    @staticmethod
    def _leave(error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else str(error)
        log(f"the files of the state folder are bound together as they were by the former process: {why}")

    def _register(self, others: dict[int, int] | None = None) -> None:
        """Note the maps that are open, beside those of the register, or instead of them beside `others`. StateError."""
        page = self._page
        words = {at: page.word(at) for at in range(_REGISTER, _REGISTER_END)} if others is None else others
        for name in self._files:
            for at, bit in _bits(name):
                words[at] |= bit
        for at, value in words.items():
            if page.word(at) != value:
                page.write_words(at, value)

    def add(self, name: str) -> None:
        """A map was opened; after `bind` it is bound like the others. StateError or OSError."""
        if self._ready:
            self._register()
            self._files[name].seal(Seal(self._page.word(IDENTITY), self._page.word(OPENING)))
            self._page.flush_page()

    def grow(self, name: str, count: int, fill: int) -> GrainFile | None:
        """A larger file for a map, beside it (GrainFile.grow); None for a map that this folder does not have.
        ConfigError."""
        former = self._files.get(name)
        return None if former is None else former.grow(count, fill)

    def replace(self, name: str, fresh: GrainFile, whole: bool) -> None:
        """It takes the place of the former one; OSError. `whole`: it has all that it should."""
        fresh.take_place(self._files[name], whole)
        self._files[name] = fresh

    def note_saved(self, serial: int) -> None:
        """The record was saved."""
        self._page.put_if_room(SERIAL, serial)

    def check(self) -> None:
        """OSError, with the file name, when an account of what is unflushed was removed or replaced while in use; the
        other maps are looked after by who uses them."""
        for name, file in self._files.items():
            if name.endswith(".unflushed"):
                try:
                    file.check()
                except OSError as error:
                    raise OSError(error.errno, error.strerror, file.path) from error

    def close(self) -> None:
        """The process ends in good order. That is said if the maps were closed before."""
        page = self._page
        if self._bare or page.word(NEXT) or not all(file.closed_well for file in self._files.values()):
            return
        try:
            page.write_words(CLOSED, 1)
            page.flush_page()
        except ReplicationError as error:
            self._leave(error)


_OLDER = "state.json is an older copy"
