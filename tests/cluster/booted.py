# SPDX-License-Identifier: BSD-3-Clause
"""A host whose first process is Debian's systemd: what is installed runs there as its units have it."""

from __future__ import annotations

from pathlib import Path

from cluster.power import HERE, Host


class Booted(Host):
    """One such host. Its root is this system's, and above it memory: what it keeps without power is in its folder."""

    def command(self, without: str) -> list[str | Path]:
        return [
            *("unshare", "--mount", "--propagation", "private"),
            *(HERE / "boot.sh", self.name, self.folder, without),
        ]

    def enter(self) -> list[str]:
        return ["nsenter", f"--target={self.init}", "--all", "--root", "--wd"]

    def power_off(self) -> None:
        super().power_off()
        for hierarchy in ("unified", "systemd", "."):
            # The kernel takes away only what is empty, the innermost first.
            below = Path("/sys/fs/cgroup", hierarchy, f"rc-{self.name}")
            for folder in sorted(below.rglob("*/"), reverse=True) if below.is_dir() else ():
                folder.rmdir()
            if below.is_dir():
                below.rmdir()
