# SPDX-License-Identifier: BSD-3-Clause
"""scripts/compile, and which plugin it is that the other tests run (`make test-compiled` runs them with the compiled
one)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from checkout import PLUGIN, REPOSITORY
from lab import Lab
from waiting import DEADLINE_S


def test_the_plugin_says_whether_it_is_compiled() -> None:
    dump = subprocess.run(
        ["nbdkit", "python", str(PLUGIN), "--dump-plugin"], capture_output=True, text=True, timeout=30, check=True
    )
    compiled = PLUGIN != REPOSITORY / "plugin.py"
    assert f"replication_compiled={'yes' if compiled else 'no'}\n" in dump.stdout
    if compiled:
        text = (REPOSITORY / "scripts/compile").read_text()
        listed = re.search(r"MODULES='(.*?)'", text, re.DOTALL)
        assert listed is not None
        for module in listed[1].split():
            assert list((PLUGIN.parent / "replication").glob(f"{module}.*.so")), f"{module} is not compiled"


class Tree:
    """A copy of the sources with a stand-in for the environment's Python."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts/compile", root / "scripts/compile")
        for name in ("plugin.py", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, root / name)
        shutil.copytree(REPOSITORY / "replication", root / "replication", ignore=shutil.ignore_patterns("__pycache__"))

    def python(self, script: str) -> None:
        """What `python -m mypyc FILE...` does, in a folder of its own."""
        path = self.root / ".venv/bin/python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def compile(self, *folder: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", str(self.root / "scripts/compile"), *map(str, folder)],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path / "tree")
    tree.python(
        "for file in ${@:3}; do [[ $file == -* ]] || touch ${file%.py}.abi.so; done; mkdir build; touch build/scrap.so"
    )
    return tree


def test_a_copy_is_made_beside_its_sources_and_made_anew(tree: Tree) -> None:
    before = tree.files()
    for _ in range(2):
        done = tree.compile()
        assert (done.returncode, done.stderr) == (0, "")
        (tree.root / "build/compiled/replication/old.py").touch()
    done = tree.compile()
    made = {name.removeprefix("build/compiled/"): data for name, data in tree.files().items() if name not in before}
    assert "replication/order/gate.abi.so" in made
    assert "replication/old.py" not in made
    assert not [name for name in made if name.startswith("build/") or name == "pyproject.toml"]
    sources = {name: data for name, data in before.items() if name == "plugin.py" or name.startswith("replication/")}
    assert {name: made[name] for name in sources} == sources


@pytest.mark.parametrize("folder", [".", "replication", "scripts"])
def test_a_folder_with_something_else_is_left_alone(tree: Tree, folder: str) -> None:
    before = tree.files()
    done = tree.compile(folder)
    assert done.returncode == 1
    assert "holds something else: name another folder" in done.stderr
    assert tree.files() == before


def test_what_was_there_stays_when_the_compiler_fails(tree: Tree) -> None:
    assert tree.compile().returncode == 0
    before = tree.files()
    tree.python("echo no compiler >&2; exit 1")
    done = tree.compile()
    assert done.returncode == 1
    assert done.stderr == "no compiler\ncompile: mypyc has failed, see above\n"
    del before[".venv/bin/python"]
    assert before.items() <= tree.files().items()


def test_a_copy_that_fails_half_way_leaves_what_was_there(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree.compile().returncode == 0
    before = tree.files()
    tools = tree.root / "tools"
    tools.mkdir()
    # A full disk, say: of what is copied last, the folder, only a part gets there.
    (tools / "cp").write_text('#!/bin/sh\n/bin/cp "$@"\n[ "$1" != -r ] || { rm "$4"/compiled-modules; exit 1; }\n')
    (tools / "cp").chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        assert tree.compile().returncode == 1
    shutil.rmtree(tools)
    assert tree.files() == before
    assert tree.compile().returncode == 0


def test_another_python_compiles_for_itself(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a package's build, which has no .venv; what it asks of the compiler stays, and no path of the run gets in."""
    other = tree.root / "python"
    (tree.root / ".venv/bin/python").rename(other)
    other.write_text(f'{other.read_text()}\necho "$CFLAGS" "$PWD" >{tree.root}/told\n')
    monkeypatch.setenv("COMPILE_PYTHON", str(other))
    monkeypatch.setenv("CFLAGS", "-O2 -g")
    done = tree.compile()
    assert (done.returncode, done.stderr) == (0, "")
    *flags, where = (tree.root / "told").read_text().split()
    assert flags == ["-O2", "-g", f"-ffile-prefix-map={where}=."]


def test_without_the_environment_it_says_what_to_do(tree: Tree) -> None:
    shutil.rmtree(tree.root / ".venv")
    done = tree.compile()
    assert done.returncode == 1
    assert "run scripts/setup compile" in done.stderr
    assert tree.compile("one", "two").returncode == 2


# -- compiled modules that do not fit ----------------------------------------------------------------------------

OTHER_PYTHON = "cpython-39"
TAG = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]


def for_another_python(compiled: Path) -> None:
    compiled.rename(compiled.with_name(compiled.name.replace(sys.implementation.cache_tag, OTHER_PYTHON)))


def without_a_tag(compiled: Path) -> None:
    compiled.rename(compiled.with_name(compiled.name.replace(f".{TAG}", "")))


def left_as_it_is(compiled: Path) -> None:
    """What is no shared object has the right name."""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (for_another_python, f"are for another Python ({OTHER_PYTHON}, this is {sys.implementation.cache_tag})"),
        (without_a_tag, "cannot be loaded ("),
        (left_as_it_is, "cannot be loaded ("),
    ],
    ids=["for another Python", "without a tag", "no shared object"],
)
def test_compiled_modules_that_do_not_fit_cost_one_line_and_the_sources_run(
    lab: Lab, change: Callable[[Path], None], why: str
) -> None:
    folder = lab.folder / "compiled"
    shutil.copytree(REPOSITORY / "replication", folder / "replication", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "plugin.py", folder)
    for module in ("order/gate", "image/stack"):
        compiled = folder / f"replication/{module}.{TAG}.so"
        compiled.write_bytes(b"no shared object")
        change(compiled)
    dump = subprocess.run(
        ["nbdkit", "python", str(folder / "plugin.py"), "--dump-plugin"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert "replication_compiled=no\n" in dump.stdout
    (line,) = dump.stderr.splitlines()
    assert line.startswith("nbdkit: error: nbdkit-replication: the compiled modules ")
    assert why in line
    assert line.endswith(": the uncompiled ones run; compile again")


def test_of_two_pythons_modules_those_that_fit_run_without_a_word(tmp_path: Path) -> None:
    """As in a folder that both have used."""
    if PLUGIN == REPOSITORY / "plugin.py":
        pytest.skip("nothing is compiled here (make test-compiled)")
    folder = tmp_path / "compiled"
    shutil.copytree(PLUGIN.parent, folder)
    for compiled in list(folder.rglob("*.so")):
        shutil.copy(compiled, compiled.with_name(compiled.name.replace(sys.implementation.cache_tag, OTHER_PYTHON)))
    dump = subprocess.run(
        ["nbdkit", "python", str(folder / "plugin.py"), "--dump-plugin"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert "replication_compiled=yes\n" in dump.stdout
    assert dump.stderr == ""
