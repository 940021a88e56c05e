# SPDX-License-Identifier: BSD-3-Clause
"""The power-cut simulator of durability=power.

How it works: the file operations of the image stack and the state folder go through one seam
(replication/disk/files.py). A history of a secondary with two disks, drawn from a seed, is run with a recorder in
that seam (history.py, recorder.py). Then, for cuts at any tick of it, states that a disk may hold are drawn: unsynced
writes lost, kept or torn at 512 bytes, in any order. Each is put in place, a process of another boot is started on it,
and what flush, FUA, checkpoint, planned stop and failover had promised must be there (verify.py).

What it verifies
* The process starts on every permitted state, in the stage that was last saved; an answered command was saved.
  state.json, which is overwritten in place, is the record saved last or one that was being saved, whole.
* The guest face is the last checkpoint, the same one on both disks and as a whole, plus the guest's writes: those
  flushed (or written with FUA) are there, those after it are there or not, sector by sector. Nothing else is.
* Writes of the primary that it has flushed, or that a checkpoint has counted, are on the secondary disk.
* After an unclean end checkpoint and planned stop are refused, failover is not, and gives what the guest face showed.
  A commit that was cut goes on, to the same content. In done the disk alone is right.
* A process killed in the boot that the cut ends, and copies that fail half way, leave nothing that is taken for stable
  but is not. After an end in good order nothing is missing at all.
* A second cut, while the first is recovered from or the commit after it runs, changes nothing of what the guest sees.
* The qcow2 images are right by themselves: qemu-img finds no error, and converts the stack to permitted content
  (a few samples of each history).

What it does not verify
* That the kernel, the file system and the disk keep what fdatasync, RWF_DSYNC, rename and fsync of a folder promise;
  that a power cut leaves a file's other sectors and its size alone; disks with sectors of less than 512 bytes.
* Making the images and the state folder (qemu-img and the first start; they are stable when a history begins), and
  what else does not pass the seam or is not recorded: the mapped files, which are taken as old, new or mixed.
* Writes that change one file at the same time: the recorder lets one system call change a file after the other.
* durability=process; a disk behind NBD; the primary; a resync after the cut; failover-failed, and disks that fail.
* That target writes reach the disk and guest writes are read back while no power fails: tests/model does.
* All states: they are far too many, so they are sampled. A seed that has passed says nothing about the next.

A violation keeps the folder and the recorded history; its message says how to look at it again:

    PYTHONPATH=.:tests /usr/bin/python3 -m power.simulator FOLDER/history CUT SAMPLE
    PYTHONPATH=.:tests /usr/bin/python3 -m power.simulator SEED [SAMPLES [FAULT]]

The first starts from the recorded history, with whatever the product is now after the cut; the second makes the history
of a seed anew, which is the same one only if it has one thread. FAULT breaks the product first (faults.py).
"""

from __future__ import annotations

import pickle
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from power.faults import FAULTS
from power.history import History, Life
from power.recorder import Killed
from power.verify import Sample, Violation

FOLDER = Path("/var/tmp")
"""On a disk: durability=power refuses tmpfs, which /tmp often is."""

_QEMU_EVERY = 40


def simulate(seed: int, samples: int, keep: bool = True) -> Counter[str]:
    """Live one history and look at so many states; how many were found in each stage. Violation. Changes this process:
    its environment, and what its threads may die of. `keep`: leave what failed behind, to be looked at."""
    _quiet()
    folder = Path(tempfile.mkdtemp(prefix=f"power-{seed}-", dir=FOLDER))
    try:
        history = Life(seed, folder / "host").run()
        found = _sample_all(history, samples, keep)
    except BaseException as error:
        if keep:
            error.add_note(f"seed {seed}; kept in {folder}")
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return found


def _sample_all(history: History, samples: int, keep: bool) -> Counter[str]:
    draw = random.Random(history.seed)
    found: Counter[str] = Counter()
    for sample in range(samples):
        cut = _draw_cut(history, draw)
        try:
            found[Sample(history, cut, sample).check(qemu=sample % _QEMU_EVERY == 0)] += 1
        except Violation as error:
            where = f"seed {history.seed} ({history.threads} threads), cut {cut} of {history.last}, sample {sample}"
            if keep:
                recorded = Path(history.folder).with_name("history")
                recorded.write_bytes(pickle.dumps(history))
                where += f"; again: PYTHONPATH=.:tests /usr/bin/python3 -m power.simulator {recorded} {cut} {sample}"
            raise Violation(f"{error}\n{where}") from error
    return found


def _draw_cut(history: History, draw: random.Random) -> int:
    """Any tick; more often one where something has just been promised, and one of the end of replication or of what a
    failure has left, which are short."""
    if history.critical and draw.random() < 0.2:
        return draw.choice(history.critical)
    ends = [command.begun for command in history.commands if command.name in ("stop", "failover")]
    first = ends[0] if ends and draw.random() < 0.4 else 0
    near = [tick for tick in history.interesting if tick >= first]
    return draw.choice(near) if near and draw.random() < 0.5 else draw.randint(first, history.last)


def _quiet() -> None:
    """A thread that was killed on purpose is no news."""
    former = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not Killed:
            former(arguments)

    threading.excepthook = hook


def main(arguments: list[str]) -> None:
    """The command line of the module's docstring."""
    if arguments[0].isdecimal():
        if len(arguments) > 2:
            FAULTS[arguments[2]]()
        found = simulate(int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 100, len(arguments) < 3)
        print(*(f"{stage}={count}" for stage, count in sorted(found.items())))
        return
    with open(arguments[0], "rb") as file:
        history: History = pickle.load(file)
    Path(history.folder).mkdir(parents=True, exist_ok=True)
    (Path(history.folder) / "state").mkdir(exist_ok=True)
    print(Sample(history, int(arguments[1]), int(arguments[2])).check(qemu=True))


if __name__ == "__main__":
    main(sys.argv[1:])
