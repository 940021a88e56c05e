# SPDX-License-Identifier: BSD-3-Clause
"""A node as a service of its host: known by a NAME, described by one file, started by systemd.

Read `config.py` first: what a NAME stands for.

What always holds:

* The file alone says what a node is. Every path in it is absolute, since a service is started in no folder of its own.
* Nothing here is needed to run a node by hand: without a NAME, and without a notify socket, none of it does anything.
* Every wait has a deadline.
"""
