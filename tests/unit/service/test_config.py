# SPDX-License-Identifier: BSD-3-Clause
"""service/config.py: a NAME and what it stands for, or one line that names the file and the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manpages import Page, verbatim
from replication.errors import ConfigError
from replication.options import OptionParser
from replication.service import config
from replication.service.config import Address, ServiceConfig, load, names
from replication.service.handlers import Handler
from replication.stage import Mode

SECONDARY = 'mode = "secondary"\n[disk.a]\ndisk = "/srv/a.img"\ntop-id = "guest"\n'


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (config.CONFIG_VARIABLE, config.STATE_VARIABLE, config.RUN_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(config.CONFIG_VARIABLE, str(tmp_path))


def loaded(folder: Path, text: str, name: str = "vm1") -> ServiceConfig:
    (folder / f"{name}.toml").write_text(text)
    return load(name)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    said = str(caught.value)
    assert "\n" not in said
    assert said.count(str(folder / "vm1.toml")) == 1
    return said


def test_a_file_without_service_has_the_folders_of_a_service(tmp_path: Path) -> None:
    found = loaded(tmp_path, SECONDARY)
    assert (found.name, found.path, found.options.mode) == ("vm1", str(tmp_path / "vm1.toml"), Mode.SECONDARY)
    assert found.state == "/var/lib/nbdkit-replication/vm1"
    assert found.control == "/run/nbdkit-replication/vm1/control.sock"
    assert found.guest_socket == "/run/nbdkit-replication/vm1/guest.sock"
    assert found.options.disks[0].active == "/var/lib/nbdkit-replication/vm1/a.active.qcow2"
    assert found.given == {"mode"}
    assert (found.service.listen, found.service.socket_mode, found.service.tls) == ((), 0o660, "off")
    assert (found.service.watchdog_s, found.service.threads, found.handlers) == (None, None, ())


def test_what_the_file_says_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.RUN_VARIABLE, "/elsewhere")
    found = loaded(
        tmp_path,
        'state = "/s"\n' + SECONDARY + '[service]\nlisten = ["10.0.0.1:1", "[::1]:2", ":3", "host-b"]\n'
        'socket-group = "kvm"\nsocket-mode = "0600"\ntls = "require"\ntls-psk = "/k"\nthreads = 4\n'
        'log-level = "debug"\nwatchdog = 7\nnbdkit = ["-v"]\n[[handler]]\nevent = "error"\ncommand = "/x"\n',
    )
    assert (found.state, found.control) == ("/s", "/elsewhere/vm1/control.sock")
    service = found.service
    assert service.listen == (Address("10.0.0.1", 1), Address("::1", 2), Address("", 3), Address("host-b", 10809))
    assert [str(address) for address in service.listen] == ["10.0.0.1:1", "[::1]:2", ":3", "host-b:10809"]
    assert (service.socket_group, service.socket_mode, service.tls, service.tls_psk) == ("kvm", 0o600, "require", "/k")
    assert (service.threads, service.log_level, service.watchdog_s, service.nbdkit) == (4, "debug", 7, ("-v",))
    assert found.handlers == (Handler("error", ("/x",)),)


def test_the_plugin_takes_the_same_file(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        'state = "/s"\n' + SECONDARY + "[service]\nthreads = 4\n[[handler]]\nevent = 'error'\ncommand = '/x'\n",
    )
    parser = OptionParser()
    parser.add("config", found.path)
    parser.add("control", found.control)
    assert parser.finish() == found.options


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[service]\nlisten = ['x:y']", "listen = 'x:y' in [service] is not an address"),
        ("[service]\nlisten = ['a:0']", "listen = 'a:0'"),
        ("[service]\nlisten = ['a:65536']", "listen = 'a:65536'"),
        ("[service]\nlisten = ['[fe80]:1']", "listen = '[fe80]:1'"),
        ("[service]\nlisten = ['::1']", "listen = '::1'"),
        ("[service]\nlisten = [':1', ':1']", "listen in [service] has :1 twice"),
        ("[service]\nlisten = 1", "listen in [service]"),
        ("[service]\nguest-socket = 'g'", "[service] guest-socket = 'g' must be an absolute path"),
        (f"[service]\nguest-socket = '/{'g' * 107}'", "is longer than 107 bytes"),
        ("[service]\nguest-socket = '/run/nbdkit-replication/vm1/control.sock'", "is the control socket"),
        ("[service]\nsocket-mode = 660", "socket-mode = 660"),
        ("[service]\nsocket-mode = '888'", "socket-mode = '888'"),
        ("[service]\nsocket-group = 'a b'", "socket-group = 'a b'"),
        ("[service]\ntls = 'yes'", "tls = 'yes' in [service] should be one of off, on, require"),
        ("[service]\ntls = 'on'", "tls = 'on' in [service] needs tls-certificates or tls-psk there"),
        ("[service]\ntls-psk = '/k'", "need tls = 'on' or 'require'"),
        ("[service]\ntls = 'on'\ntls-psk = '/k'\ntls-certificates = '/c'", "exclude each other"),
        ("[service]\ntls-verify-peer = 1", "tls-verify-peer in [service] must be true or false"),
        ("[service]\nthreads = 0", "threads = 0"),
        ("[service]\nthreads = true", "threads = True"),
        ("[service]\nlog-level = 'loud'", "log-level = 'loud'"),
        ("[service]\nwatchdog = 1", "watchdog = 1"),
        ("[service]\nwatchdog = true", "watchdog = True"),
        ("[service]\nnbdkit = [1]", "nbdkit in [service]"),
        ("[service]\nmode = 'primary'", "unknown key 'mode' in [service]"),
        ("[[service]]", "service must be a table [service]"),
        ("[[handler]]\nevent = 'error'", "[[handler]] number 1 lacks command ="),
        ("[handler]", "write one table [[handler]] for each handler"),
        ("x = ", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_its_name_and_key(tmp_path: Path, text: str, named: str) -> None:
    assert named in refusal(tmp_path, SECONDARY + text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('state = "s"\n' + SECONDARY, "state = 's' must be an absolute path"),
        ('control = "c"\n' + SECONDARY, "control = 'c'"),
        (SECONDARY.replace("/srv/a.img", "a.img"), "disk of [disk.a] = 'a.img'"),
        (SECONDARY + 'active = "x"', "active of [disk.a] = 'x'"),
        (SECONDARY.replace("secondary", "third", 1), "The option mode's value should be primary or secondary"),
        ("", "Missing the option mode"),
    ],
)
def test_a_bad_key_of_the_node_is_refused_with_the_file(tmp_path: Path, text: str, named: str) -> None:
    assert named in refusal(tmp_path, text)


def test_a_disk_behind_nbd_is_no_path(tmp_path: Path) -> None:
    found = loaded(tmp_path, SECONDARY.replace("/srv/a.img", "nbd+unix:///?socket=/d.sock"))
    assert found.options.disks[0].location == "nbd+unix:///?socket=/d.sock"


def test_names_are_the_files_that_can_be_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("b.toml", "a.toml", ".hidden.toml", "c.toml~", "d", "e f.toml"):
        (tmp_path / file).write_text("")
    assert names() == ["a", "b"]
    assert names(str(tmp_path / "none")) == []
    monkeypatch.setenv(config.CONFIG_VARIABLE, str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="cannot read"):
        names()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".a", "a" * 65, "a\n", "a b"])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a node"):
        load(name)


def test_a_node_without_a_file_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cannot read config={tmp_path / 'vm2.toml'}: No such file")):
        load("vm2")


# The manual page


def test_every_key_of_the_service_is_in_the_manual_page() -> None:
    heads = " ".join(entry.head for entry in Page("replication.toml").entries("KEYS OF THE SERVICE"))
    assert set(re.findall(r"B<([a-z-]+) =", heads)) == config.SERVICE_KEYS


def test_the_example_of_the_manual_page_is_taken(tmp_path: Path) -> None:
    text = verbatim(Page("replication.toml").section("EXAMPLE"))
    example = re.sub(r"^ ", "", text, flags=re.MULTILINE)
    found = loaded(tmp_path, example[example.index('mode = "primary"') :])
    assert (found.options.autostart, found.service.socket_group) == (True, "libvirt-qemu")
