# SPDX-License-Identifier: BSD-3-Clause
"""The table of advice (tests/advice.py) is the product's: every row has its text and its test.

test_docs.py holds the sources against it.
"""

from __future__ import annotations

import pytest

from advice import HARMLESS, NO_ADVICE, TABLE, advising
from checkout import REPOSITORY


def test_every_row_is_of_a_text_that_is_there() -> None:
    found = advising()
    pieces = [row[0] for row in TABLE] + [*HARMLESS, *NO_ADVICE]
    assert [piece for piece in pieces if not any(piece in text for text in found)] == []
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize("row", [row for row in TABLE if row[2].startswith(("unit/", "e2e/"))], ids=lambda row: row[0])
def test_the_test_that_follows_an_advice_is_there(row: tuple[str, str, str]) -> None:
    name, _, test = row[2].partition("::")
    source = (REPOSITORY / "tests" / name).read_text()
    assert not test or f"def {test}(" in source
