# SPDX-License-Identifier: BSD-3-Clause
"""What nbdkit asks of us, and what we do about nbdkit and Python.

Read `export.py` first: it finds the face behind an export name, and every request goes through it. The other files are
about the process that we are a guest in: its threads, its clients, its end.

What always holds:

* A request that fails has an errno for its client; it never ends the process or the connection.
* Nothing here knows what a request means for the pair. That begins behind `export.py`.
"""
