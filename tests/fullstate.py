# SPDX-License-Identifier: BSD-3-Clause
"""A state folder that cannot be written when a test says so, from the save on that it says."""

from __future__ import annotations

from pathlib import Path

from checkout import PLUGIN

SCRIPT = """\
import builtins, os, sys
sys.path[:0] = [{repository!r}]
__file__ = {plugin!r}
exec(compile(builtins.open(__file__).read(), __file__, "exec"))
from replication.record.state import StateError, StateFolder

def save(self, record, *arguments, real=StateFolder.save, **options):
    if os.path.exists({plan!r}):
        with builtins.open({plan!r}, "r+") as file:
            left = int(file.read())
            if not left:
                raise StateError("cannot write state.json: No space left on device")
            file.seek(0)
            file.write(f"{{left - 1:9}}")
    real(self, record, *arguments, **options)

StateFolder.save = save
"""


class FullState:
    """Has the saves of one node's record fail. The node runs `script` in place of the plugin (`instead`)."""

    def __init__(self, folder: Path, name: str) -> None:
        self._plan = folder / f"{name}.plan"
        self._script = folder / f"{name}-full.py"
        self._script.write_text(SCRIPT.format(repository=str(PLUGIN.parent), plugin=str(PLUGIN), plan=str(self._plan)))

    def instead(self, command: list[str]) -> list[str]:
        """The command of a node, with the script."""
        return [str(self._script) if part == str(PLUGIN) else part for part in command]

    def fill(self, after: int = 0) -> None:
        """No room any more after so many saves."""
        fresh = self._plan.with_suffix(".new")
        fresh.write_text(f"{after:9}")
        fresh.replace(self._plan)

    def make_room(self) -> None:
        """It works."""
        self._plan.unlink(missing_ok=True)
