# SPDX-License-Identifier: BSD-3-Clause
"""Watches all nodes of a host: what replication-monitor is, a process of its own beside them.

Read `service.py` first: what it is made of and how it begins and ends. `watcher.py` is the conversation with one node,
`sight.py` what was learned of it, `journal.py` its events and the last hour, `fleet.py` which nodes there are,
`handlers.py` whose commands run,
`metrics.py` what Prometheus reads, `web.py` who may read and what they get.

What always holds:

* It asks and never commands: the only requests to a node are queries. What a handler's command does is its own.
* Each node has a thread, a connection and deadlines of its own. A node that hangs delays nobody else's figures.
* A reader gets what is known already. No request to the web server waits for a node.
* Everything kept is bounded: nodes, events, samples, connections, and the size of one event.
* Whatever a node answers, the figures of the others are complete.
* prometheus_client is imported in this wing only.
"""
