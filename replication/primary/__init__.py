# SPDX-License-Identifier: BSD-3-Clause
"""The primary's half of the pair: the guest's disk, and all that goes to the secondary.

Read `disk.py` first (a write, step by step), then `forward.py` (the queue), `link.py` (connection, loss, return) and
`epochs.py` (checkpoints). `side.py` puts them together for all disks of the process.

What always holds:

* The guest's write is answered by the primary's disk. A dead, slow or refusing secondary never fails it.
* A grain that may differ on the secondary has a mark in the change map before the local disk changes.
* Overlapping writes reach the secondary in the order in which the primary's disk has them.
* No lock is held across network I/O.
"""
