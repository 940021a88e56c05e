# SPDX-License-Identifier: BSD-3-Clause
"""What processes use, out of /proc: processor time and memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_RESET_PEAK = "5"
"""For /proc/PID/clear_refs: VmHWM begins anew (proc(5))."""


@dataclass(frozen=True)
class Memory:
    """Bytes of all processes together."""

    peak: int
    """VmHWM: the most that was resident since the last reset, pages shared with others and of mapped files included."""
    private: int
    """Resident now and of no other process: what would be free without it."""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command, which may contain anything: [0] is the state, [1] the parent."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def with_children(pids: Sequence[int]) -> list[int]:
    """`pids` and all that they have started, directly or not, and is still there."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile, so it is none of those that matter
    found = list(pids)
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


def processor_s(pids: Sequence[int]) -> float:
    """Seconds of processor time so far, in user space and in the kernel, ended children included."""
    return sum(sum(int(field) for field in _stat(pid)[11:15]) for pid in pids) / _TICKS


def reset_peak(pids: Sequence[int]) -> None:
    """Let the peak of memory begin anew."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK, encoding="utf-8")


def memory(pids: Sequence[int]) -> Memory:
    """What they use now, and have used at most since `reset_peak`."""
    peak = sum(_kilobytes(Path(f"/proc/{pid}/status"), ("VmHWM",)) for pid in pids)
    private = sum(_kilobytes(Path(f"/proc/{pid}/smaps_rollup"), ("Private_Clean", "Private_Dirty")) for pid in pids)
    return Memory(peak * 1024, private * 1024)


def _kilobytes(path: Path, names: tuple[str, ...]) -> int:
    """The sum of the lines `names` of a file with lines like `VmHWM:   1234 kB`."""
    total = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            total += int(value.split()[0])
    return total


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T" for task in tasks)
