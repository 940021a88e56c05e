# SPDX-License-Identifier: BSD-3-Clause
"""What a disk that a guest has used holds: a clean file system, and records in order."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from guestimages import copy_sparse
from records import Record, decode
from waiting import DEADLINE_S

_NOT_COUNTED = r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.$"
"""ext4 sums these up in the superblock when it unmounts or mounts; in every disk that is in use they are old."""

_CLOCK = r"Superblock last (mount|write) time is in the future\.$|\s+\(by less than a day"
"""The clock of a guest under TCG may be ahead: it measures how fast its processor counts while that is made to wait."""

_NO_COMPLAINT = r"$|e2fsck \d|Pass \d|Fix\? no$|.*WARNING: Filesystem still has errors|.*: \d+/\d+ files \(|" + _CLOCK


def _tool(*command: str | Path) -> tuple[int, str]:
    """Run a tool: its exit code and what it said."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def inspect(image: Path, *, unmounted: bool = False) -> list[Record]:
    """The records on a disk; AssertionError unless its file system is clean, once its journal has been replayed.
    `unmounted`: there must be nothing to replay either. `image` itself is not changed."""
    copy = copy_sparse(image, image.with_name(f"{image.name}.inspected"))
    try:
        if not unmounted:
            # What the next mount does. -n alone would judge by what the journal is there to mend.
            code, said = _tool("e2fsck", "-E", "journal_only", "-y", copy)
            if code not in (0, 1) or "? yes" in said:
                raise AssertionError(f"{image.name} is not clean, its journal cannot be replayed ({code}): {said}")
        code, said = _tool("e2fsck", "-f", "-n", copy)
        complaints = [line for line in said.splitlines() if not re.match(_NO_COMPLAINT, line)]
        if not unmounted:
            complaints = [line for line in complaints if not re.match(_NOT_COUNTED, line)]
        if complaints or code not in (0, 4):
            raise AssertionError(f"the file system of {image.name} is not clean ({code}): {said}")
        dumped = copy.with_suffix(".records")
        dumped.unlink(missing_ok=True)
        code, said = _tool("debugfs", "-R", f"dump /records {dumped}", copy)
        if not dumped.exists():
            raise AssertionError(f"{image.name} has no file of records ({code}): {said}")
        content = dumped.read_bytes()
        dumped.unlink()
    finally:
        copy.unlink()
    return decode(content)
