# SPDX-License-Identifier: BSD-3-Clause
"""Who waits for whom.

Read `gate.py` first: all requests inside it, or one command alone. `rangelock.py` orders requests that meet on a block.
The order in which a thread may take locks stands in `replication/__init__.py`.

What always holds:

* First come, first served: no request and no command starves.
* Every wait has a deadline.
"""
