# SPDX-License-Identifier: BSD-3-Clause
"""The control layer: QMP, as QEMU 7.2 speaks it, in three files that each know less than the one above.

    server.py       bytes and threads: the Unix socket and its clients
    commands.py     the table of commands, and what each asks of the node
    qmp.py          the protocol: bytes in, bytes out; no socket, no node

A file imports only from those below its own.
"""
