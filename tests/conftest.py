# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of all tests: the laboratory, which ends what it started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A Lab of this test alone. Ending it fails the test if a process had ended by itself or had to be killed."""
    laboratory = Lab()
    try:
        yield laboratory
    finally:
        said = laboratory.stderr()
        if said:
            request.node.add_report_section("teardown", "processes", said)
        laboratory.close()
