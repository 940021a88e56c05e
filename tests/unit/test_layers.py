# SPDX-License-Identifier: BSD-3-Clause
"""Holds the table "Layers" in replication/__init__.py: who may import whom.

The checks read source text only, so a violation is found without importing (or being able to import) anything.
Each check is a function from a tree to a list of complaints, and is shown a tree that violates it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "replication"
CLIENT = f"{PACKAGE}/client"
NO_NOUNS = frozenset({"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"})


def layer_table(root: Path) -> list[list[str]]:
    """The rows of the table from the top, each a list of paths such as `replication/disk/file.py`.

    A name without a folder that follows one with a folder on the same row is in that folder, as in
    `disk/file.py endpoint.py`.
    """
    docstring = ast.get_docstring(ast.parse((root / PACKAGE / "__init__.py").read_text())) or ""
    block = re.search(r"^Layers .*\n-+\n((?:[ ]+.*\n)+)", docstring, re.MULTILINE)
    assert block, "replication/__init__.py has no table under the heading 'Layers'"
    rows = []
    wing = ""
    for line in block[1].splitlines():
        first, *others = line.split()
        if first.endswith("/"):
            wing = first
            continue
        if not line.startswith(" " * 8):
            wing = ""
        names = list(takewhile(lambda word: word.endswith(".py"), [first, *others]))
        assert names, f"a row of the layer table begins with no file: {line.strip()}"
        rows.append([name if name == "plugin.py" else f"{PACKAGE}/{wing}{name}" for name in names])
    return rows


def wings(root: Path) -> list[str]:
    """The packages in the package, by their paths."""
    return sorted(str(path.parent.relative_to(root)) for path in (root / PACKAGE).glob("*/__init__.py"))


def modules(root: Path) -> list[str]:
    """plugin.py and every module of the package, package `__init__` files left out."""
    found = [str(path.relative_to(root)) for path in sorted((root / PACKAGE).rglob("*.py"))]
    return ["plugin.py", *(path for path in found if not path.endswith("/__init__.py"))]


def dotted(path: str) -> str:
    """The module name of a path: `replication/disk/file.py` is `replication.disk.file`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a file imports, in functions and under TYPE_CHECKING too.

    `from a import b` gives `a.b`, whether b is a module or not; relative names are made absolute.
    """
    for node in ast.walk(ast.parse((root / path).read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                folder = path.split("/")[: -node.level]
                origin = ".".join([*folder, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def own_imports(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """Line and path of every module of ours that a file imports; packages themselves do not count."""
    ours = {dotted(module): module for module in modules(root)}
    for line, name in imported_names(root, path):
        target = ours.get(name) or ours.get(name.rpartition(".")[0])
        if target:
            yield line, target


def table_complaints(root: Path) -> list[str]:
    """Where table and files differ."""
    listed = [name for row in layer_table(root) for name in row]
    present = set(modules(root))
    return [
        *(f"{name} stands in the table more than once" for name in sorted({n for n in listed if listed.count(n) > 1})),
        *(f"{name} is in the table but not there" for name in listed if not (root / name).is_file()),
        *(f"{name} is missing in the table" for name in sorted(present - set(listed))),
    ]


def direction_complaints(root: Path) -> list[str]:
    """Imports of a module that is not on a row below the importing one."""
    row_of = {name: number for number, row in enumerate(layer_table(root)) for name in row}
    complaints = []
    for path in modules(root):
        if path not in row_of or not (root / path).is_file():
            continue  # table_complaints names it
        for line, target in own_imports(root, path):
            if target in row_of and row_of[target] <= row_of[path]:
                complaints.append(f"{path}:{line} imports {target}, which is not below it")
    for init in sorted((root / PACKAGE).rglob("__init__.py")):
        # A package file that imports modules would pull them in below everything.
        path = str(init.relative_to(root))
        complaints.extend(f"{path}:{line} imports {target}" for line, target in own_imports(root, path))
    return complaints


def nbdkit_complaints(root: Path) -> list[str]:
    """Files of the package that import nbdkit."""
    return [
        f"{path}:{line} imports nbdkit"
        for path in (str(found.relative_to(root)) for found in sorted((root / PACKAGE).rglob("*.py")))
        for line, name in imported_names(root, path)
        if name.split(".")[0] == "nbdkit"
    ]


def client_complaints(root: Path) -> list[str]:
    """Imports by which the client of a control socket would need more of the plugin than the client."""
    return [
        f"{path}:{line} imports {target}, which is not in {CLIENT}"
        for path in modules(root)
        if path.startswith(f"{CLIENT}/")
        for line, target in own_imports(root, path)
        if not target.startswith(f"{CLIENT}/")
    ]


def backward_complaints(root: Path) -> list[str]:
    """Files that are installed and import from the tests, which are not."""
    of_tests = {"tests", *(path.stem for path in (root / "tests").glob("*.py"))}
    of_tests |= {path.name for path in (root / "tests").glob("*/") if not path.name.startswith((".", "__"))}
    scripts = [f"scripts/{name}" for name in installed_scripts(root)]
    complaints = []
    for path in [*modules(root), *scripts]:
        if not (root / path).is_file():
            continue  # table_complaints names it
        complaints += [
            f"{path}:{line} imports {name}, which is the tests'"
            for line, name in imported_names(root, path)
            if name.split(".")[0] in of_tests
        ]
    return complaints


def installed_scripts(root: Path) -> list[str]:
    """The scripts that `make install` installs."""
    found = re.search(r"^INSTALLED_SCRIPTS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert found, "the Makefile does not name the scripts that are installed"
    return found[1].split()


def name_complaints(root: Path) -> list[str]:
    """Modules and packages whose name says nothing about what is in them."""
    return [path for path in modules(root) if NO_NOUNS.intersection(dotted(path).split("."))]


def wing_complaints(root: Path) -> list[str]:
    """Wings that do not say what they are for, what always holds in them, and which of their files to read first; and
    wings that the table splits, so that one would be above and below another."""
    complaints = []
    for wing in wings(root):
        text = ast.get_docstring(ast.parse((root / wing / "__init__.py").read_text())) or ""
        if "What always holds:" not in text:
            complaints.append(f"{wing} does not say what always holds in it")
        first = re.search(r"Read `([\w.]+)` first", text)
        if first is None or not (root / wing / first[1]).is_file():
            complaints.append(f"{wing} does not name the file to read first")
    seen: list[str] = []
    for row in layer_table(root):
        wing = row[0].rpartition("/")[0]
        if wing in seen[:-1] and wing != PACKAGE:
            complaints.append(f"{wing} stands in the table in more than one place")
        if not seen or seen[-1] != wing:
            seen.append(wing)
    return complaints


CHECKS = (
    table_complaints,
    direction_complaints,
    nbdkit_complaints,
    client_complaints,
    backward_complaints,
    name_complaints,
    wing_complaints,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_this_tree(check) -> None:
    assert check(ROOT) == []


def test_this_tables_folders() -> None:
    rows = layer_table(ROOT)
    assert rows[0] == ["plugin.py"]
    assert [f"{PACKAGE}/disk/file.py", f"{PACKAGE}/disk/endpoint.py"] in rows


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree without a fault."""
    files = {
        "plugin.py": "import nbdkit\nfrom replication.node import Node\nfrom replication import VERSION\n",
        "replication/__init__.py": (
            '"""Toy.\n\nLayers (below)\n------\n    plugin.py       the top. It is not node.py\n    node.py\n'
            '    image/  a wing\n        a.py b.py  two\n    stage.py\n\nAnd more\n"""\n\nVERSION = "1"\n'
        ),
        "replication/node.py": "from .image import a\nimport replication.image.b\nfrom . import VERSION, stage\n",
        "replication/image/__init__.py": '"""Images.\n\nRead `a.py` first.\n\nWhat always holds:\n\n* Much.\n"""\n',
        "replication/image/a.py": "from ..stage import Stage\n",
        "replication/image/b.py": "import stage_of_others\nfrom replication.stage import Stage\n",
        "replication/stage.py": "import enum\n",
        "scripts/ctl": "import sys\nfrom replication.stage import Stage\n",
        "scripts/check": "import lab\n",
        "tests/lab.py": "from replication.node import Node\n",
        "tests/power/verify.py": "import lab\n",
        "Makefile": "INSTALLED_SCRIPTS := ctl\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_faultless_tree(tree: Path, check) -> None:
    assert check(tree) == []


@pytest.mark.parametrize(
    ("path", "text", "target"),
    [
        ("stage.py", "from . import node", "node.py"),
        ("stage.py", "from .image.a import A", "image/a.py"),
        ("stage.py", "import replication.node", "node.py"),
        ("stage.py", "def f():\n    from replication.image import b", "image/b.py"),
        ("stage.py", "if TYPE_CHECKING:\n    from .node import Node", "node.py"),
        ("image/a.py", "from .b import B", "image/b.py"),
        ("image/b.py", "from . import a", "image/a.py"),
        ("image/a.py", "from .. import node", "node.py"),
        ("image/__init__.py", "from .a import A", "image/a.py"),
        ("node.py", "from . import node", "node.py"),
    ],
)
def test_upward_or_sideways_import_is_found(tree: Path, path: str, text: str, target: str) -> None:
    (tree / PACKAGE / path).write_text(text + "\n")
    (complaint,) = direction_complaints(tree)
    assert complaint.startswith(f"{PACKAGE}/{path}:{text.count(chr(10)) + 1} imports {PACKAGE}/{target}")


def test_import_of_plugin_is_found(tree: Path) -> None:
    (tree / PACKAGE / "stage.py").write_text("from plugin import open\n")
    assert direction_complaints(tree) == ["replication/stage.py:1 imports plugin.py, which is not below it"]


def test_module_without_a_row_is_found(tree: Path) -> None:
    (tree / PACKAGE / "image" / "c.py").write_text("")
    assert table_complaints(tree) == ["replication/image/c.py is missing in the table"]


@pytest.mark.parametrize("name", ["plugin.py", "replication/image/b.py"])
def test_row_without_a_module_is_found(tree: Path, name: str) -> None:
    (tree / name).unlink()
    assert table_complaints(tree) == [f"{name} is in the table but not there"]


@pytest.mark.parametrize("text", ["import nbdkit", "from nbdkit import debug", "def f():\n    import nbdkit as n"])
def test_nbdkit_in_the_package_is_found(tree: Path, text: str) -> None:
    (tree / PACKAGE / "image" / "a.py").write_text(text + "\n")
    assert len(nbdkit_complaints(tree)) == 1


@pytest.mark.parametrize("path", ["scripts/ctl", "replication/stage.py", "plugin.py"])
@pytest.mark.parametrize("text", ["import lab", "from power.verify import V", "def f():\n    from tests import lab"])
def test_installed_file_that_imports_from_the_tests_is_found(tree: Path, path: str, text: str) -> None:
    (tree / path).write_text(text + "\n")
    (complaint,) = backward_complaints(tree)
    assert complaint.startswith(f"{path}:{text.count(chr(10)) + 1} imports ")


def test_client_that_needs_the_plugin_is_found(tree: Path) -> None:
    (tree / CLIENT).mkdir()
    (tree / CLIENT / "session.py").write_text("from ..stage import Stage\nfrom .qmp import Qmp\n")
    (tree / CLIENT / "qmp.py").write_text("import json\n")
    assert client_complaints(tree) == [f"{CLIENT}/session.py:1 imports replication/stage.py, which is not in {CLIENT}"]


@pytest.mark.parametrize("name", ["util.py", "image/helpers.py", "common/disk.py"])
def test_name_that_says_nothing_is_found(tree: Path, name: str) -> None:
    path = tree / PACKAGE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert name_complaints(tree) == [f"{PACKAGE}/{name}"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not say what always holds in it"),
        ("Read `a.py` first.", "does not say what always holds in it"),
        ("What always holds: much.", "does not name the file to read first"),
        ("Read `c.py` first. What always holds: much.", "does not name the file to read first"),
    ],
)
def test_wing_that_says_too_little_is_found(tree: Path, text: str, complaint: str) -> None:
    (tree / PACKAGE / "image" / "__init__.py").write_text(f'"""{text}"""\n')
    assert f"{PACKAGE}/image {complaint}" in wing_complaints(tree)


def test_split_wing_is_found(tree: Path) -> None:
    init = tree / PACKAGE / "__init__.py"
    init.write_text(
        init.read_text().replace("a.py b.py  two\n    stage.py\n", "a.py\n    stage.py\n    image/\n        b.py\n")
    )
    assert wing_complaints(tree) == [f"{PACKAGE}/image stands in the table in more than one place"]
