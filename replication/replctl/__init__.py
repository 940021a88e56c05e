# SPDX-License-Identifier: BSD-3-Clause
"""The command line of replctl, and what it does with the nodes of this host as a whole.

Read `table.py` first: it has one row for each command. `line.py` makes argparse's parser of the table and runs what was
typed. What a command asks of one node is in the wing `client`.

What always holds:

* A command's module is imported when the command runs, and no other: failover has to work on a host that lacks what a
  table or a check needs, and completion has to be quick.
* Every command ends with one of the exit codes of `outcome.py`, and has --json.
* Nothing here changes a node or a disk. Only `init` writes, one new file.
"""
