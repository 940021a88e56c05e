# SPDX-License-Identifier: BSD-3-Clause
"""QMP, as QEMU 7.2 speaks it, over two transports: a Unix socket for operators, and an NBD export for the pair.

Read `commands.py` first: the table of an operator's commands, and what each asks of the node. `qmp.py` is the protocol
(bytes in, bytes out; no socket, no node), `server.py` the socket, `inband.py` and `paircommands.py` the pair's own.

What always holds:

* Whatever a client sends, it gets a QMP answer; the socket lives on, and the stage changes by valid commands only.
* A command that answers with an error has changed nothing, or says what has changed.
"""
