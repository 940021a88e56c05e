# SPDX-License-Identifier: BSD-3-Clause
"""What the journal of the guests finds, told by journals that break each promise (tests/cluster/journal.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.journal import Journal

GOOD = """\
1 begin a g1 0 -
2 ack a g1 0
3 ack a g1 1
4 safe a g1 1
5 ack a g1 2
6 begin b g2 2 g1
7 ack b g2 2
8 begin a g3 3 g2
9 ack a g3 3
"""


def violations(folder: Path, text: str) -> list[str]:
    path = folder / "journal"
    path.write_text(text)
    return Journal(path).violations()


def test_what_came_after_the_last_checkpoint_may_be_lost(tmp_path: Path) -> None:
    assert violations(tmp_path, GOOD) == []


def test_a_write_that_was_not_answered_may_be_there(tmp_path: Path) -> None:
    assert violations(tmp_path, "1 begin a g1 0 -\n2 ack a g1 0\n3 begin b g2 2 g1\n4 ack b g2 2\n") == []


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("7 ack b g2 2", "7 ack b g2 2\n7.5 ack a g1 3", "it was answered although"),
        ("6 begin b g2 2 g1", "6 begin b g2 1 g1", "were safe"),
        ("8 begin a g3 3 g2", "8 begin a g3 3 g1", "record 2 was written by g2"),
    ],
)
def test_each_promise(tmp_path: Path, line: str, instead: str, said: str) -> None:
    assert line in GOOD
    [found, *_] = violations(tmp_path, GOOD.replace(line, instead))
    assert said in found


def test_a_promotion_of_what_was_left_behind_long_ago_shows_although_there_was_no_checkpoint_since(
    tmp_path: Path,
) -> None:
    """`b` has gone on from all that `a` had, alone, and `a` goes on from the same."""
    text = """\
1 begin a g1 0 -
2 ack a g1 0
3 begin b g2 1 g1
4 ack b g2 1
{} ack b g2 2
90 begin a g3 {} g1
91 ack a g3 {}
"""
    assert violations(tmp_path, text.format(6, 1, 1)) == []
    [found] = violations(tmp_path, text.format(60, 1, 1))
    assert "gone on for 56.0 s" in found
