# SPDX-License-Identifier: BSD-3-Clause
"""The overlays: active, hidden and the secondary disk as one image, in files that stock qemu-img reads.

Read `stack.py` first: it says which of two requests on one block goes first. `target.py` is the primary's writes and
copy-before-write, `descent.py` the way down after a failover, `overlay.py` one overlay, `qcow2.py` the format.

What always holds:

* Data is in place before the bit that shows it. With `durability=power` it is stable before the bit is.
* Old content is in hidden before the secondary disk below it is overwritten.
* An image that is not as this software makes it is refused, and not written to.
"""
