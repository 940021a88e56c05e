# SPDX-License-Identifier: BSD-3-Clause
"""What is known of whose content, and outlives the process.

Read `state.py` first (the folder and what is in it), then `changes.py` (which grains may differ) and `lineage.py` (what
two nodes that meet may do to each other, as a table).

What always holds:

* What a decision depends on is on disk before the decision is acted on.
* What cannot be read, or does not belong together, is an error or means "everything may differ"; never "nothing has".
"""
