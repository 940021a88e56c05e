# SPDX-License-Identifier: BSD-3-Clause
"""A node as a resource of Pacemaker: the agent ocf:nbdkit:replication (OCF 1.1, promotable).

Read `agent.py` first: it has one method for each action. What it does follows from `decision.py`; `asking.py` has the
questions to the node, `telling.py` what the cluster learns.

Pacemaker promotes and demotes; the node owns its disks or keeps a copy. These are not the same:

    promoted      the cluster lets the guest run here. A mark in the folder of the cluster's run-time files says so; it
                  goes with the boot
    owner         the node's content is what counts. That outlives everything

An owner that was not promoted waits: it is the best candidate, unless another one went on from what it has. What the
cluster keeps (`pacemaker.py`, the register) says so even where the two nodes cannot reach each other: who was promoted
last, and the lineage of its disks.

What always holds:

* A node is promoted only if nothing of what the register's owner had is known to be missing on it.
* The register judges only what it knew of: by the ids of promotions (`serials.py`) a node tells an entry that
  was there before its own promotion, and has come back.
* Every action ends before the time that the cluster gives it; what a node or a tool does not answer in time is an
  error.
* An action that is repeated, or was cut off anywhere, does what is left to be done.
"""
