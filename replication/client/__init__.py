# SPDX-License-Identifier: BSD-3-Clause
"""The other end of a control socket: the QMP client, and what replctl makes of a node's answers.

Read `commands.py` first: what each command of replctl asks of a node, and prints. `session.py` is the conversation with
one node, `qmp.py` the QMP client in it, `values.py` and `status.py` turn answers into text, `progress.py` into bars.

What always holds:

* Nothing here imports the plugin: what it knows of a node, it has asked. A member of an answer that a later version has
  added is shown as it is.
* Every wait has a deadline, except for the next event.
* What a node says cannot drive the terminal.
* rich is imported where it draws: failover has to work on a host that lacks it.
"""
