# SPDX-License-Identifier: BSD-3-Clause
"""debian/ against the rest of the repository: one version, one table of packages, and nothing started unasked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from replication import VERSION

REPOSITORY = Path(__file__).resolve().parents[2]
DEBIAN = REPOSITORY / "debian"
# What debhelper brings or stands for.
VIRTUAL = {
    "debhelper-compat": "debhelper",
    "dh-sequence-python3": "dh-python",
    "dh-sequence-installsysusers": "debhelper",
}


def _field(name: str) -> set[str]:
    text = (DEBIAN / "control").read_text(encoding="utf-8")
    match = re.search(rf"^{name}:((?:\n? .*)+)", text, re.MULTILINE)
    assert match is not None, name
    return {entry.split()[0] for entry in match[1].split(",") if entry.strip() and not entry.strip().startswith("$")}


def _table(*purposes: str) -> set[str]:
    match = re.search(r"^TABLE='\n(.*?)^'", (REPOSITORY / "scripts/setup").read_text(encoding="utf-8"), re.M | re.S)
    assert match is not None
    rows = [line.split(maxsplit=2) for line in match[1].splitlines()]
    return {name for purpose, name, _ in rows if purpose in purposes}


def test_the_package_has_the_version_of_the_program() -> None:
    first = (DEBIAN / "changelog").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"nbdkit-replication ({VERSION}) ")


def test_it_depends_on_what_the_program_needs_to_run() -> None:
    # python3 comes by dh_python3, with the versions for which the modules were compiled.
    assert _field("Depends") | {"python3"} == _table("runtime") | {"python3"}
    assert _field("Recommends") == _table("monitor")


def test_setup_installs_what_the_build_needs() -> None:
    needed = {VIRTUAL.get(name, name) for name in _field("Build-Depends")}
    assert needed <= _table("runtime", "package")


def test_the_licence_is_the_repositorys() -> None:
    def words(path: Path, start: str) -> list[str]:
        return re.sub(r"(?m)^ \.$", "", path.read_text(encoding="utf-8")).partition(start)[2].split()

    start = "Redistribution and use"
    assert words(DEBIAN / "copyright", start) == words(REPOSITORY / "LICENSE", start) != []


def test_the_scripts_of_the_package_are_executable_and_named_in_their_control_file() -> None:
    control = (DEBIAN / "tests/control").read_text(encoding="utf-8")
    for name in re.findall(r"^Tests: (.*)$", control, re.MULTILINE):
        assert (DEBIAN / "tests" / name).stat().st_mode & 0o111, name
    assert (DEBIAN / "rules").stat().st_mode & 0o111


class Builder:
    """A checkout, and a stand-in for dpkg-buildpackage that runs `script` in the copy."""

    def __init__(self, folder: Path, script: str) -> None:
        self.checkout, self.bin = folder / "checkout", folder / "bin"
        for name in ("scripts", "debian", ".venv/bin", "build", ".git", ".mypy_cache"):
            (self.checkout / name).mkdir(parents=True)
            (self.checkout / name / "file").touch()
        # As if the compiler of the modules were there.
        (self.checkout / "scripts/setup").write_text("#!/bin/bash\n")
        (self.checkout / "scripts/setup").chmod(0o755)
        shutil.copy(REPOSITORY / "scripts/deb", self.checkout / "scripts/deb")
        shutil.copy(DEBIAN / "changelog", self.checkout / "debian/changelog")
        self.bin.mkdir()
        for name, text in (("dpkg-buildpackage", script), ("dh", "exit 0")):
            (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.bin / name).chmod(0o755)

    def build(self, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "scripts/deb", *arguments],
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def test_a_copy_of_the_sources_is_built_with_the_release_in_its_version(tmp_path: Path) -> None:
    script = "head -n 1 debian/changelog >../p.deb; find . -type f | sort >../p.dsc"
    builder = Builder(tmp_path, script)
    for _ in range(2):
        done = builder.build()
        made = builder.checkout / "build/deb"
        assert (done.returncode, done.stdout, done.stderr) == (0, f"deb: {made}/p.deb\n", "")
    release = re.search(r'^VERSION_ID="?(\d+)', Path("/etc/os-release").read_text(encoding="utf-8"), re.MULTILINE)
    assert release is not None
    assert (made / "p.deb").read_text().startswith(f"nbdkit-replication ({VERSION}~deb{release[1]}) ")
    assert (made / "p.dsc").read_text().split() == [
        "./debian/changelog",
        "./debian/file",
        "./scripts/deb",
        "./scripts/file",
        "./scripts/setup",
    ]
    assert (builder.checkout / "debian/changelog").read_bytes() == (DEBIAN / "changelog").read_bytes()


def test_the_modules_are_compiled_by_the_pinned_compiler_if_it_can_be_had(tmp_path: Path) -> None:
    builder = Builder(tmp_path, 'echo "${DEB_BUILD_PROFILES:-} ${COMPILE_PYTHON:-}" >../p.deb')
    made = builder.checkout / "build/deb/p.deb"
    profile = "pkg.nbdkit-replication.compiled"
    assert builder.build().returncode == 0
    assert made.read_text().split() == [profile, str(builder.checkout / ".venv/bin/python")]
    assert profile in (DEBIAN / "rules").read_text(encoding="utf-8")
    assert builder.build("--plain").returncode == 0
    assert made.read_text().split() == []
    (builder.checkout / "scripts/setup").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    done = builder.build()
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, "no network")
    assert "slower with small requests" in done.stderr
    assert made.read_text().split() == []


def test_a_build_that_fails_shows_why_and_leaves_the_packages_of_the_last(tmp_path: Path) -> None:
    builder = Builder(tmp_path, "touch ../p.deb")
    assert builder.build().returncode == 0
    (builder.bin / "dpkg-buildpackage").write_text("#!/bin/sh\necho no compiler\nexit 2\n")
    done = builder.build()
    assert (done.returncode, done.stderr) == (1, "no compiler\ndeb: dpkg-buildpackage has failed, see above\n")
    assert (builder.checkout / "build/deb/p.deb").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    builder = Builder(tmp_path, "touch ../p.deb")
    done = builder.build(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"deb: {tmp_path} holds something else: name another folder\n")
    assert builder.build(tmp_path, tmp_path).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "checkout"]


def test_nothing_of_the_package_starts_a_node() -> None:
    """An upgrade restarts those that run, and no script starts or enables one."""
    for script in DEBIAN.glob("*.p??*"):
        if script.suffix not in (".postinst", ".prerm", ".postrm", ".preinst"):
            continue
        asked = re.findall(
            r"^[^#\n]*deb-systemd-(?:invoke|helper) (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert set(asked) <= {"try-restart", "stop"}, script.name
    rules = (DEBIAN / "rules").read_text(encoding="utf-8")
    assert re.search(r"^\tdh_installsystemd .*--no-enable --no-start$", rules, re.MULTILINE)
