# SPDX-License-Identifier: BSD-3-Clause
"""tls.py and the keys tls-certificates, tls-psk and tls-username: what is refused before anything connects."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from certificates import Authority, psk_file
from replication.errors import ConfigError
from replication.options import OptionParser, Options
from replication.tls import Tls, explain
from replication.uri import is_tls

PRIMARY = [("mode", "primary"), ("disk", "/d"), ("state", "/s")]
SECONDARY = [("mode", "secondary"), ("disk", "/d"), ("top-id", "top"), ("state", "/s")]


def parse(pairs: list[tuple[str, str]]) -> Options:
    parser = OptionParser()
    for key, value in pairs:
        parser.add(key, value)
    return parser.finish()


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return str(psk_file(tmp_path / "psk", "pair", "pa"))


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    return Authority(tmp_path / "ca").client()


@pytest.mark.parametrize("mode", [[*PRIMARY, ("secondary", "nbds://b")], PRIMARY, SECONDARY])
def test_the_keys_are_taken_on_both_sides(mode: list[tuple[str, str]], psk: str, certificates: Path) -> None:
    assert parse([*mode, ("tls-psk", psk), ("tls-username", "pair")]).tls == Tls(None, psk, "pair")
    assert parse([*mode, ("tls-certificates", str(certificates))]).tls == Tls(str(certificates))
    assert parse(mode).tls == Tls()


def test_paths_count_from_the_folder_of_the_start(psk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(psk).parent)
    assert parse([*PRIMARY, ("tls-psk", "psk"), ("tls-username", "pair")]).tls.psk == psk


def test_both_ways_at_once_are_refused(psk: str, certificates: Path) -> None:
    with pytest.raises(ConfigError, match="tls-certificates and tls-psk are two ways"):
        parse([*PRIMARY, ("tls-certificates", str(certificates)), ("tls-psk", psk)])


def test_a_user_without_a_key_is_refused(certificates: Path) -> None:
    """Also with certificates, where libnbd would not look at it."""
    for more in ([], [("tls-certificates", str(certificates))]):
        with pytest.raises(ConfigError, match="tls-username is the user of tls-psk, which is missing"):
            parse([*PRIMARY, ("tls-username", "pair"), *more])


@pytest.mark.parametrize("name", ["", "a:b", "a\0"])
def test_what_is_no_user_is_refused(psk: str, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a user's name"):
        parse([*PRIMARY, ("tls-psk", psk), ("tls-username", name)])


def test_keys_that_nothing_uses_are_refused(psk: str) -> None:
    keys = [("tls-psk", psk), ("tls-username", "pair")]
    with pytest.raises(ConfigError, match="neither secondary= nor disk= is one"):
        parse([*PRIMARY, ("secondary", "nbd://b"), *keys])
    used_by_the_disk = [("mode", "primary"), ("disk", "nbds+unix:///?socket=/x"), ("state", "/s")]
    parse([*used_by_the_disk, ("secondary", "nbd://b"), *keys])


def test_a_user_that_the_file_does_not_have_is_refused(psk: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"there is no line 'p:KEY' in {psk}")):
        Tls(None, psk, "p").check()
    Tls(None, psk, "pa").check()


def test_without_a_user_it_is_the_login_name(psk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "pair")
    Tls(None, psk).check()
    monkeypatch.setenv("LOGNAME", "somebody")
    with pytest.raises(ConfigError, match="there is no line 'somebody:KEY'"):
        Tls(None, psk).check()


def test_a_key_that_is_not_hexadecimal_is_refused(tmp_path: Path) -> None:
    for key in ("", "xyz", "abc"):
        (tmp_path / "psk").write_text(f"pair:{key}\n")
        with pytest.raises(ConfigError, match=r"key of 'pair' in .* is not hexadecimal"):
            Tls(None, str(tmp_path / "psk"), "pair").check()


@pytest.mark.parametrize("missing", ["psk", "folder/ca-cert.pem"])
def test_what_is_not_there_is_refused(tmp_path: Path, missing: str) -> None:
    tls = Tls(str(tmp_path / "folder")) if "/" in missing else Tls(None, str(tmp_path / "psk"), "pair")
    with pytest.raises(ConfigError, match=re.escape(f"cannot read {tmp_path}/{missing}: No such file")):
        tls.check()


@pytest.mark.parametrize("name", ["client-cert.pem", "client-key.pem"])
def test_half_a_client_certificate_is_refused(certificates: Path, name: str) -> None:
    """libnbd would leave out the other half."""
    (certificates / name).unlink()
    with pytest.raises(ConfigError, match=r"of client-cert\.pem and client-key\.pem only one"):
        Tls(str(certificates)).check()


def test_a_link_that_leads_nowhere_is_refused(certificates: Path) -> None:
    (certificates / "ca-crl.pem").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read .*/ca-crl\.pem"):
        Tls(str(certificates)).check()


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_what_is_no_certificate_is_refused(certificates: Path, name: str) -> None:
    """libnbd would say nothing, and trust nobody."""
    (certificates / name).write_text("nonsense\n")
    text = (
        r"there is no certificate in .*/ca-cert\.pem" if name == "ca-cert.pem" else r"client-key\.pem are no pair: not"
    )
    with pytest.raises(ConfigError, match=f"^tls-certificates: .*{text}"):
        Tls(str(certificates)).check()


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, certificates: Path) -> None:
    other = Authority(tmp_path / "other").client("other")
    shutil.copy(other / "client-key.pem", certificates)
    with pytest.raises(ConfigError, match=r"client-cert\.pem and client-key\.pem are no pair: KEY_VALUES_MISMATCH"):
        Tls(str(certificates)).check()


@pytest.mark.parametrize(
    ("uri", "tls"),
    [
        ("nbds://h", True),
        ("nbds+unix:///?socket=/x", True),
        ("nbds+vsock://2", True),
        ("nbd://nbds://h", False),
        ("nbd+unix:///?socket=/x", False),
        ("/nbds://h", False),
    ],
)
def test_which_uris_demand_tls(uri: str, tls: bool) -> None:
    assert is_tls(uri) == tls
    assert (Tls.of(uri, Tls()) is not None) == tls


def test_what_a_uri_says_itself_holds(psk: str, certificates: Path) -> None:
    keys = Tls(str(certificates))
    assert Tls.of("nbds://h", keys) == keys
    assert Tls.of("nbds://h", None) == Tls()
    assert Tls.of(f"nbds://pa@h/?tls-psk-file={psk}", keys) == Tls(None, psk, "pa")
    assert Tls.of("nbds://pa@h", Tls(None, psk, "pair")) == Tls(None, psk, "pa")
    assert Tls.of(f"nbds://h/?tls-certificates={certificates}", Tls(None, psk)) == keys
    with pytest.raises(ConfigError, match="cannot read /nowhere/ca-cert"):
        Tls.of("nbds://h/?tls-certificates=/nowhere", keys)
    with pytest.raises(ConfigError, match="is not an NBD URI"):
        Tls.of("nbds://[h", keys)


@pytest.mark.parametrize("value", ["", "Local", "remote"])
def test_guest_access_is_any_or_local(value: str) -> None:
    with pytest.raises(ConfigError, match=f"guest-access={value} should be any or local"):
        parse([*PRIMARY, ("guest-access", value)])


@pytest.mark.parametrize("mode", [PRIMARY, SECONDARY])
def test_guest_access_is_taken_on_both_sides(mode: list[tuple[str, str]]) -> None:
    assert parse([*mode, ("guest-access", "local")]).guests_local
    assert not parse([*mode, ("guest-access", "any")]).guests_local
    assert not parse(mode).guests_local


def test_a_refused_client_certificate_is_named_with_its_dates(certificates: Path) -> None:
    said = explain("nbds://h", "gnutls_record_recv: alert", Tls(str(certificates)), 0.0)
    assert re.search(
        rf"{certificates}/client-cert\.pem is valid from \w+ .* GMT until \w+ .* GMT \(gnutls_record", said
    )
    assert "valid" not in explain("nbds://h", "gnutls_record_recv: alert", Tls(), 0.0)
