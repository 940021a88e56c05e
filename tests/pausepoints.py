# SPDX-License-Identifier: BSD-3-Clause
"""Where a test holds a thread of the plugin (replication/order/pause.py)."""

from __future__ import annotations

from pathlib import Path

from waiting import DEADLINE_S, wait_until


class PausePoints:
    """Arms and releases the pause points of processes started with `environment` (replication/order/pause.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {"NBDKIT_REPLICATION_PAUSE": str(folder)}

    def arm(self, name: str) -> None:
        """Hold the next thread that reaches point `name`, one thread."""
        (self.folder / name).touch()

    def wait_hit(self, name: str, timeout_s: float = DEADLINE_S) -> None:
        """Wait until a thread is held at `name`."""
        wait_until((self.folder / f"{name}.hit").exists, f"a thread reaches pause point {name}", timeout_s)

    def is_hit(self, name: str) -> bool:
        """Whether a thread is held at `name` now."""
        return (self.folder / f"{name}.hit").exists()

    def release(self, name: str) -> None:
        """Let the held thread go on; AssertionError if there is none."""
        try:
            (self.folder / f"{name}.hit").unlink()
        except FileNotFoundError:
            raise AssertionError(f"no thread is held at {name}") from None

    def disarm(self, name: str) -> None:
        """Take back an `arm` that nothing has reached, and release what has."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / f"{name}.hit").unlink(missing_ok=True)
