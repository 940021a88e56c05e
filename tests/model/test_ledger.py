# SPDX-License-Identifier: BSD-3-Clause
"""A few histories of ledger.py, the same in every run; `make ledger` has as many as one likes."""

from __future__ import annotations

import pytest

from model.ledger import replay


@pytest.mark.parametrize("number", range(3))
def test_what_a_pair_claims_is_so(number: int) -> None:
    found = replay("suite", number)
    if found:
        pytest.fail(found, pytrace=False)  # all of it, which an assertion would shorten
