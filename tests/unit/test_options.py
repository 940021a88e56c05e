# SPDX-License-Identifier: BSD-3-Clause
"""options.py: from KEY=VALUE and TOML to Options, or one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.errors import ConfigError
from replication.options import ALL_KEYS, DISK_KEYS, KEYS, Durability, OptionParser, Options
from replication.stage import Mode
from replication.uri import export_of, is_uri

PRIMARY = ["mode=primary", "state=/s"]
SECONDARY = ["mode=secondary", "state=/s"]


def parse(*pairs: str) -> Options:
    """What nbdkit does with a command line."""
    parser = OptionParser()
    for pair in pairs:
        parser.add(*pair.split("=", 1))
    return parser.finish()


def refusal(*pairs: str) -> str:
    """The one line that refuses these options."""
    with pytest.raises(ConfigError) as caught:
        parse(*pairs)
    text = str(caught.value)
    assert text
    return text


def written(folder: Path, text: str | bytes) -> str:
    """config=FILE with this content."""
    path = folder / "pair.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return f"config={path}"


# -- what is accepted ------------------------------------------------------------------------------------------


def test_a_primary_needs_a_mode_a_state_and_a_disk() -> None:
    options = parse(*PRIMARY, "disk=/d.raw")
    assert options.mode is Mode.PRIMARY
    assert [(disk.name, disk.location, disk.top_id) for disk in options.disks] == [("disk0", "/d.raw", None)]
    assert (options.state, options.control) == ("/s", "/s/control.sock")
    assert (options.autostart, options.sync, options.secondary) == (False, False, None)
    assert options.queue_limit == 64 << 20


def test_a_secondary_keeps_its_overlays_in_the_state_folder_by_default() -> None:
    (disk,) = parse(*SECONDARY, "disk=a:/d.raw", "top-id=t").disks
    assert (disk.name, disk.location, disk.top_id) == ("a", "/d.raw", "t")
    assert (disk.active, disk.hidden) == ("/s/a.active.qcow2", "/s/a.hidden.qcow2")


def test_disk_keys_belong_to_the_disk_before_them() -> None:
    first, second = parse(
        *SECONDARY, "disk=a:/1", "top-id=ta", "active=/x", "disk=b:/2", "hidden=/y", "top-id=tb"
    ).disks
    assert (first.top_id, first.active, first.hidden) == ("ta", "/x", "/s/a.hidden.qcow2")
    assert (second.top_id, second.active, second.hidden) == ("tb", "/s/b.active.qcow2", "/y")


def test_keys_of_the_process_may_stand_anywhere() -> None:
    options = parse("disk=a:/1", "top-id=t", "state=/s", "mode=secondary", "autostart=true")
    assert options.autostart
    assert options.disks[0].hidden == "/s/a.hidden.qcow2"


def test_relative_paths_count_from_the_folder_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse("mode=secondary", "state=s", "control=c", "disk=d.raw", "top-id=t", "active=a", "hidden=../h")
    (disk,) = options.disks
    assert (options.state, options.control, disk.location) == (f"{tmp_path}/s", f"{tmp_path}/c", f"{tmp_path}/d.raw")
    assert (disk.active, disk.hidden) == (f"{tmp_path}/a", f"{tmp_path.parent}/h")


@pytest.mark.parametrize(
    ("value", "name", "location"),
    [
        ("/a:b.raw", "disk0", "/a:b.raw"),
        ("name:/a:b.raw", "name", "/a:b.raw"),
        ("x:nbd://host:10809/e", "x", "nbd://host:10809/e"),
        ("nbd://host:10809/e", "disk0", "nbd://host:10809/e"),
        ("nbd+unix:///e?socket=/s", "disk0", "nbd+unix:///e?socket=/s"),
        ("nbds+vsock://1:2/", "disk0", "nbds+vsock://1:2/"),
        ("/dev/disk/by-path/pci-0000:00:1f.2", "disk0", "/dev/disk/by-path/pci-0000:00:1f.2"),
        ("a.b_c-d+e:/x", "a.b_c-d+e", "/x"),
        ("9:/x", "9", "/x"),
    ],
)
def test_a_disk_is_a_path_or_uri_with_or_without_a_name(value: str, name: str, location: str) -> None:
    (disk,) = parse(*PRIMARY, f"disk={value}").disks
    assert (disk.name, disk.location) == (name, location)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1M", 1 << 20), ("64M", 64 << 20), ("2048k", 2 << 20), ("2048K", 2 << 20), ("1G", 1 << 30), ("1T", 1 << 40)],
)
def test_a_queue_limit_has_a_unit_or_is_in_bytes(text: str, size: int) -> None:
    assert parse(*PRIMARY, "disk=/d", f"queue-limit={text}").queue_limit == size


@pytest.mark.parametrize(("text", "rate"), [("64K", 64 << 10), ("65536", 64 << 10), ("10M", 10 << 20), ("1T", 1 << 40)])
def test_a_resync_rate_is_in_bytes_a_second(text: str, rate: int) -> None:
    assert parse(*PRIMARY, "disk=/d", f"resync-rate={text}").resync_rate == rate
    assert parse(*SECONDARY, "disk=/d", "top-id=t", f"resync-rate={text}").resync_rate == rate
    assert parse(*PRIMARY, "disk=/d").resync_rate is None


@pytest.mark.parametrize("word", ["true", "TRUE", "1", "yes", "on", "y", "t"])
def test_autostart_takes_the_words_that_nbdkit_takes_for_true(word: str) -> None:
    assert parse(*PRIMARY, "disk=/d", f"autostart={word}").autostart


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off", "n", "f"])
def test_autostart_takes_the_words_that_nbdkit_takes_for_false(word: str) -> None:
    assert not parse(*PRIMARY, "disk=/d", f"autostart={word}").autostart


def test_protocol_and_timeout_are_taken_over() -> None:
    options = parse(*PRIMARY, "disk=/d", "protocol=sync", "timeout=2.5")
    assert (options.sync, options.timeout_s) == (True, 2.5)
    assert not parse(*PRIMARY, "disk=/d", "protocol=async").sync


def test_without_a_disk_the_primary_is_named_as_the_export_of_the_secondary() -> None:
    (disk,) = parse(*PRIMARY, "secondary=nbd://host/colo").disks
    assert (disk.name, disk.location) == ("colo", None)
    (disk,) = parse(*PRIMARY, "secondary=nbd+unix:///?socket=/s").disks
    assert (disk.name, disk.location) == ("disk0", None)


def test_an_export_name_in_a_uri_is_percent_encoded() -> None:
    """NBD URI specification: as libnbd, which decodes it when it connects."""
    assert export_of("nbd://host/a%20b%2Fc") == "a b/c"


def test_a_uri_is_what_libnbd_opens() -> None:
    for uri in ("nbd://h", "nbds://h", "nbd+unix:///?socket=s", "nbds+unix:///", "nbd+vsock://1", "nbds+vsock://1"):
        assert is_uri(uri)
    for path in ("nbd:h:1", "nbd", "/nbd://h", "http://h", "./nbd://h", "nbd+tcp://h", "NBD://h"):
        assert not is_uri(path)


def test_without_a_state_folder_an_autostarted_primary_needs_no_control_socket() -> None:
    options = parse("mode=primary", "disk=/d", "secondary=nbd://h", "autostart=true")
    assert (options.state, options.control) == (None, None)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([], "Missing the option mode"),
        (["disk=/d", "state=/s"], "Missing the option mode"),
        (["mode=", "state=/s"], "The option mode's value should be primary or secondary"),
        (["mode=Primary", "state=/s"], "The option mode's value should be primary or secondary"),
        (["mode=both", "state=/s"], "The option mode's value should be primary or secondary"),
        ([*PRIMARY, "disk=/d", "top-id=t"], "The primary side does not support option top-id"),
        ([*PRIMARY, "disk=/d", "active=t"], "The primary side does not support option active"),
        ([*PRIMARY, "disk=/d", "hidden=t"], "The primary side does not support option hidden"),
        ([*SECONDARY, "disk=/d"], "Missing the option top-id"),
        ([*SECONDARY, "disk=/d", "top-id="], "Missing the option top-id"),
        ([*SECONDARY, "disk=a:/d", "top-id=t", "disk=b:/e"], "Missing the option top-id of disk 'b'"),
        (SECONDARY, "Missing the option disk"),
    ],
)
def test_qemus_texts_are_kept(pairs: list[str], text: str) -> None:
    assert refusal(*pairs) == text


def test_a_secondary_refuses_the_key_that_says_who_is_one() -> None:
    text = "The secondary side does not support option secondary"
    assert refusal(*SECONDARY, "disk=/d", "top-id=t", "secondary=nbd://h") == text


def test_a_secondary_has_the_keys_of_the_link_for_when_it_is_a_primary() -> None:
    options = parse(*SECONDARY, "disk=/d", "top-id=t", "protocol=sync", "queue-limit=2M", "timeout=7.5")
    assert (options.sync, options.queue_limit, options.timeout_s) == (True, 2 << 20, 7.5)
    assert options.secondary is None


@pytest.mark.parametrize("pair", ["durability=power", "durability=process", "overlay-watermark=50", "test-space=1G"])
def test_a_primary_refuses_the_keys_of_overlays(pair: str) -> None:
    text = f"The primary side does not support option {pair.partition('=')[0]}"
    assert refusal(*PRIMARY, "disk=/d", pair) == text


def test_a_checkpoint_outlives_the_process_by_default_and_a_power_cut_when_asked() -> None:
    secondary = [*SECONDARY, "disk=/d", "top-id=t"]
    assert parse(*secondary).durability is Durability.PROCESS
    assert parse(*secondary, "durability=process").durability is Durability.PROCESS
    assert parse(*secondary, "durability=power").durability is Durability.POWER


def test_durability_of_power_needs_a_state_folder() -> None:
    pairs = ["mode=secondary", "control=/c", "disk=/d", "top-id=t", "active=/a", "hidden=/h"]
    assert parse(*pairs, "durability=process").state is None
    assert refusal(*pairs, "durability=power").startswith("Missing the option state: durability=power")


@pytest.mark.parametrize(
    ("text", "percent"), [("80", 80.0), ("80%", 80.0), ("1", 1.0), ("100", 100.0), ("99.5%", 99.5)]
)
def test_a_watermark_is_in_per_cent(text: str, percent: float) -> None:
    assert parse(*SECONDARY, "disk=/d", "top-id=t", f"overlay-watermark={text}").overlay_watermark == percent


@pytest.mark.parametrize(
    "pair",
    [
        *(f"durability={value}" for value in ("", "POWER", "both", "power ")),
        *(f"overlay-watermark={value}" for value in ("", "0", "0.9", "100.1", "-5", "nan", "inf", "full", "80%%", "%")),
    ],
)
def test_a_bad_value_of_a_key_of_overlays_is_refused_and_named(pair: str) -> None:
    assert refusal(*SECONDARY, "disk=/d", "top-id=t", pair).startswith(pair)


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ("queue-limit=", "queue-limit="),
        ("queue-limit=64", "queue-limit=64"),
        ("queue-limit=1023K", "queue-limit=1023K"),
        ("queue-limit=2T", "queue-limit=2T"),
        ("queue-limit=-1M", "queue-limit=-1M"),
        ("queue-limit=64m", "queue-limit=64m"),
        ("queue-limit=64MB", "queue-limit=64MB"),
        ("queue-limit=1.5M", "queue-limit=1.5M"),
        ("queue-limit= 64M", "queue-limit= 64M"),
        ("queue-limit=9999999999999999999999", "queue-limit="),
        ("queue-limit=٦٤M", "queue-limit="),
        ("resync-rate=", "resync-rate= is not a size"),
        ("resync-rate=0", "resync-rate=0 should be between 64K and 1T"),
        ("resync-rate=63K", "resync-rate=63K should be between 64K and 1T"),
        ("resync-rate=2T", "resync-rate=2T should be between 64K and 1T"),
        ("resync-rate=10MB/s", "resync-rate=10MB/s is not a size"),
        ("timeout=", "timeout="),
        ("timeout=soon", "timeout=soon"),
        ("timeout=0", "timeout=0"),
        ("timeout=-1", "timeout=-1"),
        ("timeout=31", "timeout=31"),
        ("timeout=nan", "timeout=nan"),
        ("timeout=inf", "timeout=inf"),
        ("timeout=1e400", "timeout=1e400"),
        ("protocol=", "protocol="),
        ("protocol=C", "protocol=C"),
        ("protocol=SYNC", "protocol=SYNC"),
        ("autostart=", "autostart="),
        ("autostart=maybe", "autostart=maybe"),
        ("autostart=2", "autostart=2"),
        ("secondary=", "secondary="),
        ("secondary=/path", "secondary="),
        ("secondary=http://host/", "secondary="),
        ("secondary=host:10809", "secondary="),
        ("secondary=nbd://[::1/", "secondary="),
        ("secondary=nbd://h\u2100st/", "secondary="),
        ("state=", "state"),
        ("control=", "control"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(pair: str, named: str) -> None:
    key = pair.partition("=")[0]
    others = [other for other in PRIMARY if not other.startswith(key + "=")]
    assert named in refusal(*others, "disk=/d", pair)


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        (["disk="], "disk="),
        (["disk=a:"], "disk="),
        (["disk=:/d"], "disk"),
        (["disk=.hidden:/d"], "'.hidden'"),
        (["disk=a b:/d"], "'a b'"),
        (["disk=" + "n" * 256 + ":/d"], "name"),
        (["disk=/1", "disk=b:/2"], "/1"),
        (["disk=a:/1", "disk=/2"], "/2"),
        (["disk=a:/1", "disk=a:/2"], "'a'"),
    ],
)
def test_a_bad_disk_is_refused_by_name(pairs: list[str], named: str) -> None:
    assert named in refusal(*PRIMARY, *pairs)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (
            [*PRIMARY, "disk=a:/no/d", "disk=b:/no/../no/d"],
            "/no/d is given twice: as disk= of disk 'a' and as disk= of disk 'b'",
        ),
        (
            [*PRIMARY, "disk=a:nbd://h", "disk=b:nbd://h"],
            "nbd://h is given twice: as disk= of disk 'a' and as disk= of disk 'b'",
        ),
        (
            [*SECONDARY, "disk=/no/d", "top-id=t", "active=/no/d"],
            "/no/d is given twice: as disk= of disk 'disk0' and as active= of disk 'disk0'",
        ),
        (
            [*SECONDARY, "disk=/no/d", "top-id=t", "active=/no/x", "hidden=/no/x"],
            "/no/x is given twice: as active= of disk 'disk0' and as hidden= of disk 'disk0'",
        ),
        (
            [*SECONDARY, "disk=a:/no/1", "top-id=t", "active=/no/x", "disk=b:/no/2", "top-id=u", "active=/no/x"],
            "/no/x is given twice: as active= of disk 'a' and as active= of disk 'b'",
        ),
    ],
)
def test_one_file_or_export_in_two_places_is_refused(pairs: list[str], text: str) -> None:
    assert refusal(*pairs) == text


def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "d")
    assert "is given twice" in refusal(*PRIMARY, f"disk=a:{tmp_path}/d", f"disk=b:{tmp_path}/link")


@pytest.mark.parametrize("key", sorted(DISK_KEYS))
def test_a_disk_key_before_any_disk_is_refused(key: str) -> None:
    assert key in refusal(*SECONDARY, f"{key}=/x", "disk=/d")


@pytest.mark.parametrize("key", sorted(DISK_KEYS))
def test_a_disk_key_given_twice_is_refused(key: str) -> None:
    text = refusal(*SECONDARY, "disk=/d", f"{key}=/x", f"{key}=/x")
    assert key in text
    assert "twice" in text


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_of_the_process_given_twice_is_refused(key: str) -> None:
    assert refusal(f"{key}=x", f"{key}=x") == f"{key} is given twice"


@pytest.mark.parametrize("key", ["bogus", "Mode", "top_id", "", "disk ", "mode\n", "readonly"])
def test_an_unknown_key_is_refused_naming_the_known_ones(key: str) -> None:
    text = refusal(f"{key}=x")
    assert "unknown key" in text
    assert all(known in text for known in ALL_KEYS)


@pytest.mark.parametrize(
    "pairs",
    [
        ["disk=a:/1", "top-id=b", "disk=b:/2", "top-id=t"],
        ["disk=a:/1", "top-id=t", "disk=b:/2", "top-id=t"],
        ["disk=a:/1", "top-id=.control"],
        ["disk=a:/1", "top-id=" + "t" * 4097],
        ["disk=a:/1", "top-id=" + "é" * 2049],
    ],
)
def test_a_top_id_that_cannot_be_an_export_of_its_own_is_refused(pairs: list[str]) -> None:
    text = refusal(*SECONDARY, *pairs)
    assert "top-id" in text
    assert len(text) < 300


def test_a_top_id_of_4096_bytes_is_an_export_name() -> None:
    assert parse(*SECONDARY, "disk=/d", "top-id=" + "é" * 2048).disks[0].top_id == "é" * 2048


@pytest.mark.parametrize("key", ["active", "hidden"])
def test_an_empty_overlay_path_is_refused(key: str) -> None:
    assert key in refusal(*SECONDARY, "disk=/d", "top-id=t", f"{key}=")


def test_a_secondary_without_state_needs_both_overlays() -> None:
    pairs = ["mode=secondary", "control=/c", "disk=/d", "top-id=t"]
    assert "active" in refusal(*pairs)
    assert "hidden" in refusal(*pairs, "active=/a")
    assert parse(*pairs, "active=/a", "hidden=/h").state is None


def test_a_uri_with_an_export_cannot_stand_for_several_disks() -> None:
    text = refusal(*PRIMARY, "disk=a:/1", "disk=b:/2", "secondary=nbd://h/e")
    assert "secondary=" in text
    assert "2 disks" in text


def test_a_primary_with_neither_disk_nor_secondary_is_refused() -> None:
    assert "disk or secondary" in refusal(*PRIMARY)


def test_without_a_control_socket_only_autostart_starts_anything() -> None:
    assert "state or control" in refusal("mode=primary", "disk=/d", "secondary=nbd://h")


# -- TOML ------------------------------------------------------------------------------------------------------


def test_a_toml_file_has_the_same_options_and_one_table_per_disk(tmp_path: Path) -> None:
    options = parse(
        written(
            tmp_path,
            """
            mode = "secondary"
            state = "/s"
            autostart = true
            [disk.a]
            disk = "/1"
            top-id = "ta"
            [disk."b"]
            disk = "nbd://h/x"
            top-id = "tb"
            active = "/x"
            """,
        )
    )
    assert options.autostart
    assert [(disk.name, disk.location, disk.top_id, disk.active) for disk in options.disks] == [
        ("a", "/1", "ta", "/s/a.active.qcow2"),
        ("b", "nbd://h/x", "tb", "/x"),
    ]


def test_numbers_in_toml_need_no_quotes(tmp_path: Path) -> None:
    text = 'timeout = 2.5\nqueue-limit = 1048576\nmode = "primary"\nstate = "/s"\n[disk.a]\ndisk = "/1"\n'
    options = parse(written(tmp_path, text))
    assert (options.timeout_s, options.queue_limit) == (2.5, 1 << 20)


def test_command_line_and_file_add_up(tmp_path: Path) -> None:
    config = written(tmp_path, 'state = "/s"\n[disk.a]\ndisk = "/1"\n')
    options = parse("mode=primary", config, "disk=b:/2")
    assert [disk.name for disk in options.disks] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mode", "pair.toml"),
        ('mode = "primary', "pair.toml"),
        ('mode = "primary"\nmode = "primary"', "pair.toml"),
        (b'mode = "\xff"', "pair.toml"),
        (b"\xff\xfe", "pair.toml"),
        ("bogus = 1", "bogus"),
        ('[disks.a]\nlocation = "/1"', "unknown key 'disks'"),
        ("mode = []", "mode"),
        ('mode = {x = "y"}', "mode"),
        ("timeout = 1979-05-27", "timeout"),
        ("timeout = true", "timeout"),
        ("timeout = nan", "timeout"),
        ("queue-limit = -5", "queue-limit"),
        ('config = "x"', "config"),
        ('top-id = "t"', "top-id"),
        ('disk = "/d"', "[disk.NAME]"),
        ('[[disk]]\nname = "a"', "[disk.NAME]"),
        ('[disk]\na = "/1"', "[disk.NAME]"),
        ("[disk.a]", "[disk.a]"),
        ('[disk.a]\ntop-id = "t"', "[disk.a]"),
        ('[disk.a]\ndisk = "/1"\nbogus = 1', "bogus"),
        ('[disk.a]\ndisk = "/1"\nmode = "primary"', "mode"),
        ("[disk.a]\ndisk = []", "disk"),
        ('[disk.a]\ndisk = "/1"\ntop-id = {}', "top-id"),
        ('[disk."a b"]\ndisk = "/1"', "'a b'"),
        ('[disk.""]\ndisk = "/1"', "name"),
        ('[disk."../x"]\ndisk = "/1"', "'../x'"),
        ('[disk.a]\ndisk = "/d\\u0000x"', "disk"),
        ('state = "/s\\u0000x"', "state"),
        ('"two\\nlines" = 1', "two"),
        ('timeout = "1\\n2"', "timeout"),
        ("timeout = " + "[" * 5000 + "]" * 5000, "pair.toml"),
        ("timeout = " + "9" * 5000, "pair.toml"),
        ("queue-limit = 0x" + "f" * 5000, "queue-limit"),
        ("x = 1\n" * 200000, "pair.toml"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_toml_file_is_refused_naming_the_file_or_key(tmp_path: Path, text: str | bytes, named: str) -> None:
    already = ["mode=primary"] if b"mode" not in (text.encode() if isinstance(text, str) else text) else []
    already += ["state=/s"] if "state" not in str(text) else []
    already += ["disk=z:/z"] if "disk" not in str(text) else []
    assert named in refusal(*already, written(tmp_path, text))


def test_an_unreadable_config_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.toml" in refusal(f"config={tmp_path}/none.toml")
    assert str(tmp_path) in refusal(f"config={tmp_path}")
    assert "config" in refusal("config=")


def test_config_given_twice_is_refused(tmp_path: Path) -> None:
    config = written(tmp_path, 'mode = "primary"')
    assert refusal(config, config) == "config is given twice"


def test_a_key_both_in_the_file_and_on_the_command_line_is_given_twice(tmp_path: Path) -> None:
    assert refusal("mode=primary", written(tmp_path, 'mode = "primary"')) == "mode is given twice"


# -- anything at all -------------------------------------------------------------------------------------------

PLAUSIBLE = st.sampled_from(
    [
        *("primary", "secondary", "a", "b:/x", "c:nbd://h", "nbd://h/e", "nbd+unix:///?socket=/s", "nbd://[", "64M"),
        *("true", "5", "", "/d", "t", "sync", ":", "nbd://", "nbds://h:99999/%", ".control", "\n", "x" * 5000),
    ]
)
# NUL cannot come from a command line; from a TOML file it can, and has its own test above.
VALUES = PLAUSIBLE | st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))
SETTING_KEYS = st.sampled_from(sorted(ALL_KEYS - {"config"})) | st.text(max_size=20)


@settings(max_examples=400)
@given(pairs=st.lists(st.tuples(SETTING_KEYS.filter(lambda key: key != "config"), VALUES), max_size=12))
def test_any_pairs_give_options_or_one_config_error(pairs: list[tuple[str, str]]) -> None:
    parser = OptionParser()
    try:
        for key, value in pairs:
            parser.add(key, value)
        options = parser.finish()
    except ConfigError:
        return
    names = [disk.name for disk in options.disks]
    assert names
    assert len(set(names)) == len(names)
    assert options.control is not None or options.autostart


URI_TEXT = st.text(st.sampled_from("abz019.:[]/?#@%&=+-\u2100\u00e9 \n"), max_size=25)


@settings(max_examples=300)
@given(rest=URI_TEXT, disks=st.integers(0, 2))
def test_any_secondary_uri_gives_options_or_one_config_error(rest: str, disks: int) -> None:
    pairs = [*PRIMARY, f"secondary=nbd://{rest}", *(f"disk=d{number}:/{number}" for number in range(disks))]
    try:
        options = parse(*pairs)
    except ConfigError:
        return
    assert options.secondary == f"nbd://{rest}"


@settings(
    max_examples=200,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
@given(
    content=st.binary(max_size=80)
    | st.lists(
        st.sampled_from(
            [
                *(
                    'mode="primary"',
                    "[disk.a]",
                    'disk="/1"',
                    "[disk]",
                    "[[disk]]",
                    "x=1",
                    "timeout=[[1]]",
                    'state="/s"',
                ),
                *("queue-limit=1e99", "a.b.c=1", '"\\u0000"=1', 'secondary="nbd://["', "autostart=true", "config=1"),
            ]
        ),
        max_size=6,
    ).map(lambda lines: "\n".join(lines).encode())
)
def test_any_config_file_gives_options_or_one_config_error(tmp_path: Path, content: bytes) -> None:
    config = written(tmp_path, content)
    try:
        options = parse(config)
    except ConfigError:
        return
    assert options.disks


# -- relative paths in URIs --------------------------------------------------------------------------------------


def test_relative_paths_in_uris_count_from_the_folder_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(*PRIMARY, "disk=nbd+unix:///a+b?socket=d.sock", "secondary=nbd+unix:///?socket=b%20b.sock")
    assert options.disks[0].location == f"nbd+unix:///a+b?socket={tmp_path}/d.sock"
    assert options.secondary == f"nbd+unix:///?socket={tmp_path}/b%20b.sock"
    assert options.folder == str(tmp_path)


def test_a_socket_path_of_a_uri_that_becomes_too_long_names_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("a" * 108)
    folder.mkdir()
    monkeypatch.chdir(folder)
    uri = "nbd+unix:///?socket=b.sock"
    assert refusal(*PRIMARY, "disk=/d", f"secondary={uri}").startswith(f"secondary={folder}/b.sock is too long")
    assert refusal(*PRIMARY, f"disk={uri}").startswith(f"disk={uri}: {folder}/b.sock is too long")


# -- roles -----------------------------------------------------------------------------------------------------


def test_role_auto_is_a_secondary_until_the_state_folder_says_more() -> None:
    options = parse("role=auto", "peer=nbd://b", "state=/s", "disk=/d", "top-id=t")
    assert (options.mode, options.role_auto, options.secondary) == (Mode.SECONDARY, True, "nbd://b")
    assert not parse(*SECONDARY, "disk=/d", "top-id=t").role_auto
    assert parse(*PRIMARY, "disk=/d", "peer=nbd://b").secondary == "nbd://b"


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (("role=auto", "mode=secondary"), "role and mode are given both"),
        (("role=primary",), "role=primary should be auto"),
        (("role=auto", "peer=b"), "peer='b' is not an NBD URI"),
        (("mode=primary", "secondary=nbd+unix:///%00"), "is not an NBD URI such as"),
        (("role=auto", "secondary=nbd://b"), "The secondary side does not support option secondary"),
        (("mode=primary", "peer=nbd://b", "secondary=nbd://b"), "peer and secondary are given both"),
        (("role=auto", "guest-face=shut"), "guest-face=shut should be open or closed-until-promoted"),
        (("role=auto", "follow-owner=maybe"), "follow-owner=maybe should be true or false"),
        (("role=auto", "follow-owner=true"), "Missing the option peer: follow-owner=true passes requests on to it"),
        (
            ("role=auto", "peer=nbd://b", "follow-owner=true", "guest-face=closed-until-promoted"),
            "follow-owner=true opens what guest-face=closed-until-promoted closes",
        ),
        (("role=auto", "on-outdated=panic"), "on-outdated=panic should be continue, suspend-io or io-error"),
        (("role=auto", "fencing=maybe"), "fencing=maybe should be dont-care or suspend-io"),
        (("role=auto", "lease=0.5"), "lease=0.5 should be between 1 and 3600 seconds"),
        (("role=auto", "wfc-timeout=soon"), "wfc-timeout=soon is not a number of seconds"),
    ],
)
def test_roles_that_are_refused(pairs: tuple[str, ...], text: str) -> None:
    top_id = () if "mode=primary" in pairs else ("top-id=t",)
    assert text in refusal(*pairs, "state=/s", "disk=/d", *top_id)
