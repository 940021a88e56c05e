# SPDX-License-Identifier: BSD-3-Clause
"""Protects a running virtual machine together with its disk; what scripts/ft-agent calls.

Read `agent.py` first: one epoch, step by step, on host A. `protection.py` makes one every interval; `store.py` is what
host B keeps, and says why in this order; `receiver.py` and `remote.py` are the two ends of the connection between them;
`takeover.py` is what host B does when A is dead.

What always holds:

* At every instant one unit, a state of the machine and the checkpoint of its disk, is the one that B would go on with.
* Whatever fails on A, the guest goes on, and the last unit stays valid.
* Every wait has a deadline.
* rich is imported where it draws: failover has to work on a host that lacks it.
"""
