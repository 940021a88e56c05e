# SPDX-License-Identifier: BSD-3-Clause
"""Which modules run: those that scripts/compile has made, or their sources.

Python takes a compiled module only if its name says that it was made for this Python, and passes over others without a
word: after an upgrade of the system the plugin would merely be slower. One that has the right name and cannot be loaded
all the same (its libraries are missing, say) ends the program with a traceback. Here both cost one line, and the
sources run.

This is decided when the module is imported: plugin.py does so before it imports any other.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from replication.log import log

_SUFFIX = ".so"


def _use_what_fits(package: str, folder: str) -> bool:
    """Load the compiled modules of `package` (a name) in `folder`; if one cannot be, none of them is from now on.
    Whether they run."""
    found = list(_compiled(folder))
    # Not endswith: ".so" alone is one of them.
    fitting = [name for name in found if "." + name.partition(".")[2] in importlib.machinery.EXTENSION_SUFFIXES]
    if found and not fitting:
        log(
            f"the compiled modules are for another Python ({_tag(found[0])}, this is {sys.implementation.cache_tag}):"
            " the uncompiled ones run; compile again"
        )
        return False
    try:
        for name in fitting:
            module = name.partition(".")[0].replace(os.sep, ".")
            importlib.import_module(f"{package}.{module}")
    except (ImportError, SystemError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        log(f"the compiled modules cannot be loaded ({why}): the uncompiled ones run; compile again")
        _forget(package)
        sys.meta_path.insert(0, _Sources(package))
        return False
    return bool(fitting)


def _compiled(folder: str) -> Iterator[str]:
    """The paths of all compiled modules, from the folder on."""
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            if name.endswith(_SUFFIX):
                yield os.path.relpath(os.path.join(where, name), folder)


def _tag(name: str) -> str:
    """For whom a module was made: cpython-311 of gate.cpython-311-x86_64-linux-gnu.so."""
    tag = os.path.basename(name).split(".")[1]
    return "-".join(tag.split("-")[:2])


def _forget(package: str) -> None:
    """What has been imported and may refer to a compiled module."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        if name not in (__name__, log.__module__):
            del sys.modules[name]


class _Sources:
    """Finds the sources of one package's modules, and nothing else."""

    def __init__(self, package: str) -> None:
        self._inside = f"{package}."

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As importlib.abc.MetaPathFinder."""
        if not name.startswith(self._inside):
            return None
        loader = (importlib.machinery.SourceFileLoader, importlib.machinery.SOURCE_SUFFIXES)
        for folder in path or ():
            found = importlib.machinery.FileFinder(folder, loader).find_spec(name)
            if found is not None:
                return found
        return None


RUNS = _use_what_fits(__name__.partition(".")[0], os.path.dirname(__file__))
"""Whether compiled modules do."""
