# SPDX-License-Identifier: BSD-3-Clause
"""What may stand in a state folder and in a configuration file: any bytes at all.

The outcome is a ConfigError of one line, or something that can be used for all that a node does with it. The names of
the record's fields come from the dataclass, so a field that is added is tried as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.control import qmp
from replication.errors import ConfigError
from replication.fault import Fault
from replication.options import ALL_KEYS, DISK_KEYS, KEYS, OptionParser, Options
from replication.reason import Reason
from replication.record.outdated import Outdated
from replication.record.state import Record, StateFolder
from replication.stage import Mode, Stage

FUZZ = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

_SAMPLE_OF: dict[str, Any] = {"int": 3, "str": "link", "float": 1.5e9, "bool": False}
FAULT = Fault(**{field.name: _SAMPLE_OF[str(field.type)] for field in dataclasses.fields(Fault)})
FULL = Record(
    Mode.PRIMARY,
    Stage.RUNNING,
    secondary="nbd+unix:///?socket=/s",
    fault=FAULT.to_json(),
    disks={"disk0": 1 << 20, "disk1": 1 << 40},
    outdated=Outdated(Reason.TOLD, "somebody has said so", 1.5e9).to_json(),
    overruled=["peer-promoted"],
    left_well=True,
    received=True,
    sought="nbd://peer",
    guests=["4711.12"],
    guests_over=["?"],
)
FIELDS = sorted(field.name for field in dataclasses.fields(Record))
FAULT_FIELDS = sorted(field.name for field in dataclasses.fields(Fault))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Not tmp_path: each example of Hypothesis needs its own."""
    with tempfile.TemporaryDirectory(prefix="s-") as path:
        yield Path(path)


@contextlib.contextmanager
def state(path: Path) -> Iterator[StateFolder]:
    """The folder in use."""
    opened = StateFolder(str(path))
    try:
        yield opened
    finally:
        opened.close()


def one_line(error: ConfigError) -> None:
    """As it goes to the operator (plugin.py makes one line of what a user has written over several)."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    if not text.isprintable() or len(text) > 100_000:
        raise AssertionError(f"no clear line: {text[:200]!r}")


# -- state.json --------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["running", "none", "done", "primary", "\ud800", "\0", "disk0", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """The text of a full record with up to three accidents: in a field, in the fault, in the table of disks, in the
    text itself."""
    content: dict[str, Any] = json.loads(json.dumps(FULL.to_json()))
    for _ in range(draw(st.integers(0, 3))):
        inner = draw(st.sampled_from(["record", "record", "fault", "disks"]))
        table = content if inner == "record" else content.get(inner)
        if not isinstance(table, dict):
            continue
        names = {"record": [*FIELDS, "format", "bogus"], "fault": [*FAULT_FIELDS, "bogus"], "disks": ["disk0", "x", ""]}
        name = draw(st.sampled_from(names[inner]))
        if draw(st.integers(0, 3)):
            table[name] = draw(VALUES)
        else:
            table.pop(name, None)
    text = bytearray(json.dumps(content, indent=draw(st.sampled_from([None, 1]))).encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, len(text)))
        match draw(st.integers(0, 2)):
            case 0:
                text[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del text[at : at + draw(st.integers(1, 40))]
            case 2:
                text[at:at] = draw(st.sampled_from([b"NaN", b"-Infinity", b"1e999", b'"', b"{", b"\xff", b"9" * 5000]))
    return bytes(text)


def assert_usable(record: Record) -> None:
    """All that a node does with its record: show it, save it, compare it."""
    assert type(record.mode) is Mode
    assert type(record.stage) is Stage
    assert isinstance(record.disks, dict)
    assert all(type(name) is str and type(size) is int for name, size in record.disks.items())
    if record.fault is not None:
        assert isinstance(Fault.from_json(record.fault).desc, str)
    shown = qmp.encode(record.to_json())  # query-replication shows the fault; it must be JSON
    assert Record.from_json(json.loads(shown)) == record


@settings(FUZZ, max_examples=1000)
@given(text=documents() | st.binary(max_size=200))
def test_any_state_file_is_refused_in_one_line_or_is_a_record_that_can_be_used(text: bytes) -> None:
    with folder() as here, state(here) as opened:
        (here / "state.json").write_bytes(text)
        try:
            record = opened.load()
        except ConfigError as error:
            one_line(error)
            assert (here / "state.json").read_bytes() == text
            return
        assert record is not None
        assert_usable(record)
        opened.save(record)
        assert opened.load() == record


@pytest.mark.parametrize("name", FAULT_FIELDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "\ud800", 10**400], ids=repr)
def test_a_fault_that_cannot_be_shown_is_no_fault(name: str, value: Any) -> None:
    """query-replication would fail for ever: QMP has neither NaN nor half a surrogate pair."""
    content = {**FULL.to_json(), "fault": {**FAULT.to_json(), name: value}}
    with folder() as here, state(here) as opened:
        (here / "state.json").write_text(json.dumps(content))
        try:
            record = opened.load()
        except ConfigError as error:
            one_line(error)
            return
        assert record is not None
        assert_usable(record)


@pytest.mark.parametrize("name", FIELDS)
@settings(FUZZ, max_examples=60)
@given(value=VALUES)
def test_any_value_of_any_field_is_refused_or_kept(name: str, value: Any) -> None:
    with folder() as here, state(here) as opened:
        (here / "state.json").write_text(json.dumps({**FULL.to_json(), name: value}))
        try:
            record = opened.load()
        except ConfigError as error:
            one_line(error)
            return
        assert record is not None
        assert_usable(record)


# -- the epoch ---------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1, 2**64 - 2, 2**64 - 3]) | st.integers(0, 2**64 - 1)
DOUBLES = st.floats().map(lambda value: struct.unpack("Q", struct.pack("d", value))[0])
PAGES = st.tuples(WORDS, WORDS | DOUBLES, WORDS | DOUBLES).map(lambda page: struct.pack("QQQ", *page))


@settings(FUZZ, max_examples=600)
@given(page=PAGES | st.binary(max_size=40), length=st.sampled_from([4096, 4096, 4096, 0, 1, 4095, 4097, 100_000]))
def test_any_epoch_file_is_refused_or_can_be_shown_and_counted_on(page: bytes, length: int) -> None:
    with folder() as here:
        (here / "epoch").write_bytes((page + bytes(length))[:length])
        try:
            opened = StateFolder(str(here))
        except ConfigError as error:
            one_line(error)
            return
        try:
            qmp.encode({"epoch": opened.epoch, "checkpoint": opened.checkpoint, "emptying": opened.emptying})
            before = opened.epoch + (not opened.emptying)
            opened.begin_epoch()
            assert opened.emptying
            opened.end_epoch(0.25)
            assert (opened.epoch, opened.emptying) == (before, False)
            assert opened.checkpoint["duration"] == 0.25
            qmp.encode(opened.checkpoint)
        finally:
            opened.close()


# -- config=FILE.toml --------------------------------------------------------------------------------------------

SAMPLES = [
    *('"primary"', '"secondary"', '"/p"', '"disk0"', '"x:/p"', '"nbd://h"', '"nbd+unix:///?socket=/s"', '"nbd://["'),
    *('"a\\u0000b"', '"nbd://h\\u0000"', '"\\n"', '""', "true", "false", "1", "0", "-1", "1.5", "inf", "nan", "64"),
    *('"64M"', '"1e3"', '"9" ', "9" * 50, "9" * 5000, "0x10", "1979-05-27", "[]", "[1]", "{}", '{disk="/p"}', "'''"),
    *('"sync"', '"async"', '"true"', '"top"', '".control"', '"' + "n" * 300 + '"'),
]
LINES = st.one_of(
    st.tuples(st.sampled_from([*sorted(ALL_KEYS), "bogus"]), st.sampled_from(SAMPLES)).map(" = ".join),
    st.sampled_from(
        [
            *("[disk.a]", "[disk.b]", '[disk.""]', "[disk]", "[[disk]]", "[disk.a.b]", '[disk."a\\nb"]', "[mode]"),
            *(
                'disk = "/p"',
                'top-id = "t"',
                'mode = "secondary"',
                'mode = "primary"',
                'state = "/s"',
                "# x",
                "]",
                "a.",
            ),
        ]
    ),
    st.text(max_size=12),
)
GOOD = 'mode = "secondary"\nstate = "/s"\n[disk.a]\ndisk = "/p"\ntop-id = "t"\n'


def parsed(text: bytes) -> Options | None:
    """What the options make of a file, None if it is refused in one line."""
    with folder() as here:
        (here / "f.toml").write_bytes(text)
        parser = OptionParser()
        try:
            parser.add("config", str(here / "f.toml"))
            return parser.finish()
        except ConfigError as error:
            one_line(error)
            return None


def assert_complete(options: Options) -> None:
    """What the node relies on; none of its texts may be one that no file system, socket or libnbd takes."""
    assert options.disks
    assert len({disk.name for disk in options.disks}) == len(options.disks)
    assert 0.1 <= options.timeout_s <= 30
    assert options.queue_limit > 0
    texts = [options.state, options.control, options.secondary]
    for disk in options.disks:
        texts += [disk.name, disk.location, disk.top_id, disk.active, disk.hidden]
        if options.mode is Mode.SECONDARY:
            assert all((disk.location, disk.top_id, disk.active, disk.hidden))
    assert all("\0" not in text for text in texts if text is not None)


@settings(FUZZ, max_examples=1500)
@given(lines=st.lists(LINES, max_size=10), good=st.booleans(), noise=st.binary(max_size=3))
def test_any_configuration_file_is_refused_in_one_line_or_complete(lines: list[str], good: bool, noise: bytes) -> None:
    text = ("\n".join(lines) + "\n" + GOOD * good).encode(errors="surrogatepass") + noise
    options = parsed(text)
    if options is not None:
        assert_complete(options)


@settings(FUZZ, max_examples=1500)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(sorted(KEYS | DISK_KEYS | {"disk", "bogus"})),
            st.text(max_size=8)
            | st.sampled_from([sample.strip('"') for sample in SAMPLES])
            | st.sampled_from(["primary", "secondary", "a:/p", "nbd://h/x", "nbd://h:x/", "nbd+unix:///%00", "\udcff"]),
        ),
        max_size=8,
    ),
    base=st.sampled_from([[], [("mode", "primary"), ("state", "/s")], [("mode", "secondary"), ("state", "/s")]]),
)
def test_any_command_line_is_refused_in_one_line_or_complete(
    pairs: list[tuple[str, str]], base: list[tuple[str, str]]
) -> None:
    parser = OptionParser()
    try:
        for key, value in [*base, *pairs]:
            parser.add(key, value)
        options = parser.finish()
    except ConfigError as error:
        one_line(error)
        return
    assert_complete(options)


def test_the_good_configuration_is_good() -> None:
    options = parsed(GOOD.encode())
    assert options is not None
    assert_complete(options)
