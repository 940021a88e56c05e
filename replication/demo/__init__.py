# SPDX-License-Identifier: BSD-3-Clause
"""The demonstration that `make demo` runs: a real file system, a primary that is killed, and every byte compared.

Read `story.py` first: the steps in their order, and what has to hold after each. `filesystem.py` makes file systems
and compares them, `writing.py` and `guest.py` are who writes, `node.py` and `processes.py` what is started.

What always holds:

* A process is ended by its own id, and nothing is left behind, whatever the end.
* Every step has a deadline.
* The nodes are asked by replctl and by their exports, as a user asks them. This wing is not installed: it runs the
  plugin of its own checkout.
"""
