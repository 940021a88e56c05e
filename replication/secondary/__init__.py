# SPDX-License-Identifier: BSD-3-Clause
"""The secondary's half of the pair: two faces of one disk, checkpoints, and failover.

Read `disk.py` first (the two faces), then `pairing.py` (which primary may write), `side.py` (checkpoint and stop for
all disks at one instant), `failover.py` and `commit.py`.

What always holds:

* The guest face shows the last checkpoint plus the writes of its own guest, whatever the primary writes.
* From the first instant of a failover no byte of the old primary reaches the disk.
* A checkpoint is of all disks or of none, also when the process is killed in its midst.
"""
