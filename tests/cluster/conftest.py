# SPDX-License-Identifier: BSD-3-Clause
"""A site for each test, on a system that is there for that alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkout import REPOSITORY
from cluster.site import Site, install

ROOT = Path("/usr/src/nbdkit-replication")


@pytest.fixture(scope="session")
def installed() -> None:
    """What is tested is installed as an administrator does it."""
    if REPOSITORY != ROOT:
        pytest.skip("make test-cluster runs these in a root of its own")
    install()


@pytest.fixture
def site(installed: None) -> Iterator[Callable[..., Site]]:
    """Makes the site; its options are those of the cluster's configuration."""
    del installed
    with ExitStack() as stack:
        # Not below pytest's own folder: the sockets' paths have to be short.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rc-"))
        Path(folder).chmod(0o755)

        def make(**options: Any) -> Site:
            return stack.enter_context(Site(Path(folder), **options))

        yield make
