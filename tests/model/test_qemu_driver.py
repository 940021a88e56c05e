# SPDX-License-Identifier: BSD-3-Clause
"""The model against QEMU's own replication driver: the model is right where QEMU is.

Left out of the histories are trims, whose result NBD leaves open and QEMU ignores, restarts, which QEMU's driver does
not survive, and the known defects of the driver. Each defect has a test below that shows it as it is in the QEMU
installed here; such a test fails when QEMU has been repaired, and then its exclusion (`RULES`) can go.
"""

from __future__ import annotations

import errno

import nbd
import pytest
from hypothesis import HealthCheck, given, note, settings

from content import KIB, MIB, pattern
from lab import Lab
from model.histories import History, Rules, check_equal, first_content, histories, replay
from model.model import CommandRefused, Face, Model, Refused
from model.qemu import QemuDriver

RULES = Rules(
    guest_reads_before_start=False,
    failover_before_start=False,
    planned_stop=False,
    target_after_end=False,
    commit_under_way=False,
    trims=False,
    restarts=False,
)

EXAMPLES = settings(
    derandomize=True,
    max_examples=120,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def run(history: History, sizes: tuple[int, ...]) -> None:
    """Replay on a fresh QEMU; at the end compare the disks, and the guest faces as a whole."""
    note("\n".join(map(repr, history)))
    contents = [first_content(size, seed) for seed, size in enumerate(sizes)]
    model = Model(contents)
    with Lab() as lab:
        driver = QemuDriver(lab, contents)
        replay(history, model, driver)
        for index, size in enumerate(sizes):
            check_equal(bytes(model.disks[index].disk), driver.disks[index].read_bytes(), f"disk {index}")
            check_equal(model.read(Face.GUEST, index, 0, size), driver.guest_image(index, size), f"guest face {index}")


@pytest.mark.timeout(400)  # half a minute on an idle machine
@EXAMPLES
@given(history=histories((MIB,), RULES))
def test_one_disk(history: History) -> None:
    run(history, (MIB,))


@pytest.mark.timeout(400)
@EXAMPLES
@given(history=histories((300 * KIB, MIB + 4608), RULES))
def test_two_disks(history: History) -> None:
    run(history, (300 * KIB, MIB + 4608))


# --- known defects of QEMU 7.2's driver, as they are; none of them may be this project's ------------------------


@pytest.fixture
def driver(lab: Lab) -> QemuDriver:
    """A fresh QEMU with one disk."""
    return QemuDriver(lab, [first_content(MIB)])


def test_defect_planned_stop_fails_and_keeps_the_buffers(driver: QemuDriver) -> None:
    driver.start()
    driver.write(Face.TARGET, 0, 0, b"t" * 512)
    driver.write(Face.GUEST, 0, 4096, b"g" * 512)
    with pytest.raises(CommandRefused, match="Backup job was cancelled unexpectedly"):
        driver.stop()
    assert driver.read(Face.GUEST, 0, 0, 512) == first_content(MIB)[:512], "hidden has been dropped"
    assert driver.read(Face.GUEST, 0, 4096, 512) == b"g" * 512, "active has been dropped"


def test_defect_false_error_during_the_commit(lab: Lab) -> None:
    # Enough to commit that the question comes before the end.
    size = 64 * MIB
    driver = QemuDriver(lab, [bytes(size)])
    driver.start()
    for offset in range(0, size, 4 * MIB):
        driver.write(Face.GUEST, 0, offset, pattern(offset, 4 * MIB))
    driver.failover(wait=False)
    assert driver.get_error() == "I/O error occurred"
    driver.failover(wait=True)
    assert driver.get_error() is None
    assert driver.disks[0].read_bytes()[:MIB] == pattern(0, MIB)


def test_defect_old_primary_writes_after_failover(driver: QemuDriver) -> None:
    driver.start()
    driver.failover()
    driver.write(Face.TARGET, 0, 0, b"old primary")
    assert driver.disks[0].read_bytes()[:11] == b"old primary"
    assert driver.read(Face.GUEST, 0, 0, 11) == b"old primary"


def test_defect_guest_read_before_start_drops_the_connection(driver: QemuDriver) -> None:
    with pytest.raises(nbd.Error) as caught:
        driver.read(Face.GUEST, 0, 0, 512)
    handle = driver.handle(Face.GUEST, 0)
    assert handle.aio_is_closed() or handle.aio_is_dead(), f"only refused: {caught.value}"


def test_defect_failover_before_start_says_nothing(driver: QemuDriver) -> None:
    # QEMU's qmp_xen_set_replication drops every error of a stop with failover.
    driver.failover(wait=False)
    assert driver.get_error() == "Block replication is not running"


def test_guest_write_before_start_is_refused(driver: QemuDriver) -> None:
    """Not a defect; beside the one above it shows that the refusal as such is intended."""
    with pytest.raises(Refused) as caught:
        driver.write(Face.GUEST, 0, 0, bytes(512))
    assert caught.value.errno == errno.EIO


def test_trim_of_the_guest_face_is_ignored(driver: QemuDriver) -> None:
    """Why trims are not in these histories: allowed by NBD, but this project promises zeros."""
    driver.start()
    driver.trim(Face.GUEST, 0, 0, 4096)
    assert driver.read(Face.GUEST, 0, 0, 4096) == first_content(MIB)[:4096]
