# SPDX-License-Identifier: BSD-3-Clause
"""boot.py: the same name within a boot, and a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.record import boot
from replication.record.boot import BOOT_ID_ENVIRONMENT, boot_clock_s, boot_id


def test_the_host_s_name_of_its_boot_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BOOT_ID_ENVIRONMENT, raising=False)
    assert boot_id() == boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot_id()


def test_a_test_may_name_another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "second")
    assert boot_id() == "second"
    monkeypatch.setenv(BOOT_ID_ENVIRONMENT, "")
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "empty names none"


def test_without_proc_it_is_an_error_and_not_a_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(BOOT_ID_ENVIRONMENT, raising=False)
    monkeypatch.setattr(boot, "_BOOT_ID", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        boot_id()


def test_boot_clock_is_not_the_one_that_people_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot.time, "time", lambda: 0.0)
    before = float(Path("/proc/uptime").read_text().split()[0])
    assert before - 0.1 <= boot_clock_s() <= before + 60.0
