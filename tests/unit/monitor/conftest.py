# SPDX-License-Identifier: BSD-3-Clause
"""Fake nodes and what watches them, ended with the test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fakenode import FakeNode
from replication.monitor.fleet import Fleet, Found
from replication.monitor.watcher import Watcher


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: Unix sockets allow 107 characters."""
    with tempfile.TemporaryDirectory(prefix="mon-") as name:
        yield Path(name)


@pytest.fixture
def node(folder: Path) -> Iterator[Callable[..., FakeNode]]:
    """Makes a started node: node(name, mode, ...)."""
    made: list[FakeNode] = []

    def make(name: str = "a", mode: str = "primary", **more: Any) -> FakeNode:
        made.append(FakeNode(folder / name, mode, **more).start())
        return made[-1]

    yield make
    for one in made:
        one.die()


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    """Makes a started fleet over the sockets of a dictionary, which may be changed while it runs."""
    made: list[Fleet] = []

    def make(sockets: dict[str, str], answer_s: float = 5.0, rescan_s: float = 0.02) -> Fleet:
        quick = partial(Watcher, interval_s=0.02, answer_s=answer_s)
        made.append(Fleet(lambda: Found(dict(sockets)), quick, rescan_s))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()
