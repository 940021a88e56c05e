# SPDX-License-Identifier: BSD-3-Clause
"""Records of the test guest: what is accepted as a history, and what is not."""

from __future__ import annotations

import subprocess

import pytest

from checkout import REPOSITORY
from records import LENGTH, Acknowledged, BadRecords, Loss, Record, decode, due, following


def history(*tags: int) -> list[Record]:
    """One record for each tag."""
    records: list[Record] = []
    for tag in tags:
        records.append(following(records[-1] if records else None, tag))
    return records


def encoded(records: list[Record]) -> bytes:
    return b"".join(record.encoded() for record in records)


FIVE = history(1, 1, 1, 2, 2)


def test_what_was_encoded_is_decoded() -> None:
    assert decode(encoded(FIVE)) == FIVE
    assert decode(b"") == []
    assert all(len(record.encoded()) == LENGTH for record in FIVE)


def test_the_guest_writes_what_is_decoded_here() -> None:
    """The lines of guest_init.sh that make a record, in a shell of this machine."""
    script = (REPOSITORY / "tests/guest_init.sh").read_text().splitlines()
    first = next(index for index, line in enumerate(script) if line.lstrip().startswith("sum=$((((sum"))
    compose = "\n".join(script[first : first + 3])
    [write] = [line.split(">>")[0].lstrip(" {") for line in script if "printf" in line]
    program = f"sum=0 tag=7\nfor n in 1 2 3 4 5 6 7 8 9 10; do\n{compose}\n{write}\ndone"
    done = subprocess.run(["/bin/sh", "-c", program], capture_output=True, timeout=30, check=True)
    assert decode(done.stdout) == history(*[7] * 10)


@pytest.mark.parametrize("length", [1, LENGTH - 1, 2 * LENGTH + 100])
def test_a_torn_record_is_found_out(length: int) -> None:
    with pytest.raises(BadRecords, match=f"record {length // LENGTH + 1} is torn"):
        decode(encoded(FIVE)[:length])


@pytest.mark.parametrize("offset", [0, 10, 23, 24, 300, LENGTH - 1])
def test_one_changed_byte_is_found_out(offset: int) -> None:
    content = bytearray(encoded(FIVE))
    content[2 * LENGTH + offset] ^= 1
    with pytest.raises(BadRecords, match="record 3"):
        decode(bytes(content))


def test_a_missing_record_is_found_out() -> None:
    with pytest.raises(BadRecords, match="record 3"):
        decode(encoded(FIVE[:2] + FIVE[3:]))


def test_a_block_of_zeroes_is_found_out() -> None:
    with pytest.raises(BadRecords, match="record 2 has no tag"):
        decode(encoded(FIVE[:1]) + bytes(LENGTH))


def test_a_record_that_another_guest_has_written_after_the_parting_is_found_out() -> None:
    other = history(1, 1, 3, 3, 3)
    with pytest.raises(BadRecords, match="record 5"):
        decode(encoded(FIVE[:4] + other[4:]))


def line(number: int, moment: float) -> Acknowledged:
    return Acknowledged(moment, number, number, moment)


def test_due_is_what_was_acknowledged_before_the_moment() -> None:
    lines = [line(1, 10.0), line(2, 11.0), line(3, 12.0)]
    assert [due(lines, moment) for moment in (9.0, 10.0, 11.5, 13.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("loss", "lost", "allowed"),
    [
        (Loss(acknowledged=5, due=5, found=5), 0, 0),
        (Loss(acknowledged=8, due=4, found=5), 3, 4),
        (Loss(acknowledged=4, due=4, found=5), 0, 0),  # durable, but not told of
    ],
)
def test_a_loss_within_the_bounds_is_accepted(loss: Loss, lost: int, allowed: int) -> None:
    loss.check(FIVE, [1, 2])
    assert (loss.lost, loss.allowed) == (lost, allowed)


@pytest.mark.parametrize(
    ("loss", "tags", "complaint"),
    [
        (Loss(acknowledged=9, due=7, found=5), [1, 2], "records 6 to 7 are gone"),
        (Loss(acknowledged=3, due=0, found=5), [1, 2], "only 3 were written"),
        (Loss(acknowledged=5, due=5, found=5), [1], r"by guests \[1, 2\]"),
        (Loss(acknowledged=5, due=5, found=5), [2, 1], r"by guests \[1, 2\]"),
    ],
    ids=["gone", "too many", "foreign", "wrong order"],
)
def test_a_loss_out_of_bounds_is_not_accepted(loss: Loss, tags: list[int], complaint: str) -> None:
    with pytest.raises(BadRecords, match=complaint):
        loss.check(FIVE, tags)
