# SPDX-License-Identifier: BSD-3-Clause
"""The control layer: QMP, as QEMU 7.2 speaks it, over two transports.

    paircommands.py the table of commands of a primary
    inband.py       the control export and its clients
    server.py       the Unix socket and its clients
    commands.py     the table of commands of an operator, and what each asks of the node
    qmp.py          the protocol: bytes in, bytes out; no socket, no node

A file imports only from those below its own.
"""
