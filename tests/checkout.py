# SPDX-License-Identifier: BSD-3-Clause
"""Where the sources are, and which plugin is tested."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

PLUGIN = Path(os.environ.get("REPLICATION_PLUGIN", REPOSITORY / "plugin.py"))
"""What is tested: the sources, or what scripts/compile has made of them (make test-compiled)."""
