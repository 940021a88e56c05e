# SPDX-License-Identifier: BSD-3-Clause
"""What the agent says of itself, and what its manual page says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from manpages import Page
from replication.cluster import metadata
from replication.cluster.codes import Code

PAGE = Page("ocf_nbdkit_replication")


def test_the_document() -> None:
    text = metadata.to_xml("1.2")
    assert '<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd"' in text
    root = ET.fromstring(text)
    assert (root.get("name"), root.get("version"), root.findtext("version")) == ("replication", "1.2", "1.1")
    assert [each.get("name") for each in root.iter("parameter")] == [each.name for each in metadata.PARAMETERS]
    roles = [each.get("role") for each in root.iter("action") if each.get("name") == "monitor"]
    assert roles == ["Promoted", "Unpromoted"]


def test_monitors_of_the_roles_have_different_intervals() -> None:
    """Pacemaker knows an operation by its name and interval."""
    found = [settings["interval"] for name, settings in metadata.ACTIONS if name == "monitor"]
    assert len(set(found)) == len(found)


def test_the_page_has_every_parameter_and_its_default() -> None:
    entries = {re.findall(r"B<(\w+)>", entry.head)[0]: entry.text for entry in PAGE.entries("PARAMETERS")}
    assert list(entries) == [each.name for each in metadata.PARAMETERS]
    for each in metadata.PARAMETERS:
        assert ("Required." in entries[each.name]) == each.required
        if each.default is not None:
            assert re.search(rf"Default: [CF<]*{re.escape(each.default)}>?\.", entries[each.name]), each.name


def test_the_page_has_every_action_and_exit_code() -> None:
    actions = [re.findall(r"B<([\w-]+)>", entry.head)[0] for entry in PAGE.entries("ACTIONS")]
    assert sorted(actions) == sorted({name for name, _ in metadata.ACTIONS})
    codes = [int(re.findall(r"B<(\d+)>", entry.head)[0]) for entry in PAGE.entries("EXIT CODES")]
    assert codes == sorted(Code)
