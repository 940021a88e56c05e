# SPDX-License-Identifier: BSD-3-Clause
"""A disk: a file, a block device, or an export of another NBD server.

Read `face.py` first: it is what every disk can do, and what it promises. `file.py` and `endpoint.py` are the two kinds,
`connection.py` is one libnbd handle with deadlines, and `files.py` the seam at which tests make system calls fail.

What always holds:

* Every request ends: with an answer, or with a DiskError when its deadline is over.
* A failure names the disk, the offset and the errno.
* A disk in use is locked as QEMU locks it.
"""
