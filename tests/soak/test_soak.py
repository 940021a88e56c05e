# SPDX-License-Identifier: BSD-3-Clause
"""Half a minute of `make soak`: everything at once, once in every run of the tests."""

from __future__ import annotations

import pytest

from soak import report
from soak.soak import Soak

SEED = "suite"
DURATION_S = 22.0


@pytest.mark.alone  # it measures how long things take
@pytest.mark.timeout(300)
def test_everything_at_once_for_a_while() -> None:
    soak = Soak(SEED, DURATION_S)
    try:
        bounds = soak.run()
    except PermissionError as error:
        pytest.skip(str(error))
    print("\n".join(report.lines(SEED, DURATION_S, soak.setting, bounds)))
    assert bounds.violated == []
    done = bounds.figures.done
    assert done["failovers"] >= 1
    assert done["disks compared"] >= 3
    assert done["guest: write"] >= 100
