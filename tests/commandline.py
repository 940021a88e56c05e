# SPDX-License-Identifier: BSD-3-Clause
"""scripts/replctl as a person runs it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping

from checkout import REPOSITORY
from qmp import SLOW
from waiting import DEADLINE_S

REPLCTL = REPOSITORY / "scripts" / "replctl"


def replctl(
    *arguments: object, cwd: str | None = None, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with nothing to read; whatever it says, it is no traceback. Again, where it is refused because
    the storage is slow."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        done = subprocess.run(
            [REPLCTL, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
            check=False,
            cwd=cwd,
            env=environ,
        )
        assert "Traceback" not in done.stderr
        if not SLOW.search(done.stderr) or time.monotonic() > deadline:
            return done
