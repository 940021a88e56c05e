# SPDX-License-Identifier: BSD-3-Clause
"""`replctl init` and `check-config`: the files are ones that the service takes, and none is ever overwritten."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import commandline
from replication.replctl import initial
from replication.service import config
from replication.stage import Mode


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "config"
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(made))
    return made


def replctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return commandline.replctl(*arguments, cwd="/srv")


def initialised(*arguments: object) -> config.ServiceConfig:
    done = replctl("init", "web1", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return config.load("web1")


def test_a_primary(folder: Path) -> None:
    found = initialised("--mode", "primary", "--disk", "vm/disk.img", "--peer", "hostb")
    assert found.options.mode is Mode.PRIMARY
    assert found.options.secondary == "nbd://hostb"
    assert found.options.checkpoint_interval_s == 1
    assert [(disk.name, disk.location) for disk in found.options.disks] == [("disk0", "/srv/vm/disk.img")]
    assert found.service.listen == ()
    assert (folder / "web1.toml").stat().st_mode & 0o777 == 0o644
    assert list(folder.iterdir()) == [folder / "web1.toml"]


def test_a_secondary(folder: Path) -> None:
    found = initialised(
        *("--mode", "secondary", "--disk", "system:/srv/a", "--disk", "data:/srv/b"),
        *("--overlays", "/dev/shm/vm", "--listen", "10.0.0.2:10810", "--top-id", "vm"),
    )
    assert found.options.mode is Mode.SECONDARY
    disks = {disk.name: (disk.top_id, disk.active, disk.hidden) for disk in found.options.disks}
    assert disks == {
        name: (f"vm-{name}", f"/dev/shm/vm/{name}.active.qcow2", f"/dev/shm/vm/{name}.hidden.qcow2")
        for name in ("system", "data")
    }
    assert [str(address) for address in found.service.listen] == ["10.0.0.2:10810"]


def test_a_secondary_with_tls(folder: Path) -> None:
    """The two sides' folders hold one another's files in practice; here it is the names that count."""
    found = initialised("--mode", "secondary", "--disk", "/srv/a", "--tls", "/etc/pair")
    assert (found.service.tls, found.service.tls_certificates) == ("require", "/etc/pair")
    assert found.service.tls_verify_peer
    assert [str(address) for address in found.service.listen] == [":10809"]


@pytest.mark.parametrize(
    ("peer", "uri"),
    [
        ("hostb:10900", "nbd://hostb:10900"),
        ("fe80::1", "nbd://[fe80::1]"),
        ("[fe80::1]:10900", "nbd://[fe80::1]:10900"),
        ("nbd+unix:///?socket=/s", "nbd+unix:///?socket=/s"),
    ],
)
def test_where_the_secondary_is(folder: Path, peer: str, uri: str) -> None:
    assert initialised("--mode", "primary", "--disk", "/srv/a", "--peer", peer).options.secondary == uri


@pytest.mark.parametrize("commented", ["primary", "secondary"])
def test_every_line_in_a_comment_can_be_put_in_force(folder: Path, commented: str) -> None:
    """Each `# key = value` alone, without the `# `, gives a file that is taken."""
    peer = ("--peer", "hostb") if commented == "primary" else ()
    initialised("--mode", commented, "--disk", "/srv/a", *peer)
    path = folder / "web1.toml"
    lines = path.read_text().splitlines()
    offered = [number for number, line in enumerate(lines) if line.startswith("# ") and " = " in line]
    assert len(offered) > 8
    for number in offered:
        key = lines[number][2:].partition(" ")[0]
        if "tls" in key:
            continue  # they need each other, and files
        changed = [*lines]
        changed[number] = lines[number][2:]
        path.write_text("\n".join(changed))
        config.load("web1")


def test_a_file_that_is_there_stays(folder: Path) -> None:
    initialised("--mode", "primary", "--disk", "/srv/a", "--peer", "hostb")
    before = (folder / "web1.toml").read_bytes()
    done = replctl("init", "web1", "--mode", "secondary", "--disk", "/srv/b", "--json")
    assert (done.returncode, json.loads(done.stdout)["failed"]["reason"]) == (1, "refused")
    assert "is there already" in done.stderr
    assert (folder / "web1.toml").read_bytes() == before
    assert list(folder.iterdir()) == [folder / "web1.toml"]


def test_one_that_came_up_meanwhile_stays_as_well(folder: Path) -> None:
    """The file is linked into its place: there is no moment between looking and writing."""
    folder.mkdir()
    path = folder / "web1.toml"
    path.write_text("of somebody else")
    with pytest.raises(initial.Refused):
        initial._write(path, "of ours")
    assert path.read_text() == "of somebody else"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--mode primary --disk /srv/a", "a primary needs --peer"),
        ("--mode secondary --disk /srv/a --checkpoint-interval 1", "is for the primary"),
        ("--mode primary --disk /srv/a --peer b --top-id x", "are for a secondary"),
        ("--mode secondary --disk a:/srv/a --disk a:/srv/b", "the same name"),
        ("--mode secondary --disk /srv/a --listen here:port", "is not an address"),
        ("--mode primary --disk /srv/a --peer b --checkpoint-interval 0.001", "should be between"),
        ("--mode primary --disk /srv/a --peer b --tls /nowhere", "cannot read /nowhere/ca-cert.pem"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(folder: Path, arguments: str, why: str) -> None:
    done = replctl("init", "web1", *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert "/tmp/" not in done.stderr
    assert not folder.exists()


def test_check_config(folder: Path, tmp_path: Path) -> None:
    assert replctl("check-config").stdout == f"no nodes: there is no file NAME.toml in {folder}\n"
    initialised("--mode", "primary", "--disk", "/srv/a", "--peer", "hostb")
    good = folder / "web1.toml"
    done = replctl("check-config")
    assert (done.returncode, done.stdout) == (0, f"{good}: ok\n")
    bad = tmp_path / "web2.toml"
    bad.write_text(good.read_text().replace("secondary =", "secondery ="))
    done = replctl("check-config", bad)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{bad}: unknown key 'secondery'")
    bad.rename(folder / "web2.toml")
    both = replctl("check-config", "--json")
    assert (both.returncode, [(each["name"], each["ok"]) for each in json.loads(both.stdout)]) == (
        1,
        [("web1", True), ("web2", False)],
    )
    assert replctl("check-config", "web1").returncode == replctl("web1", "check-config").returncode == 0
    assert replctl("check-config", "web3").returncode == 2
