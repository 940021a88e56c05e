# SPDX-License-Identifier: BSD-3-Clause
"""The commands of docs/cluster.md, typed into an empty configuration: crm and pcs take them, and so does Pacemaker."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from cluster.virt import TOOLS, commands, run, typed


@pytest.mark.parametrize("tool", TOOLS)
def test_the_commands_are_taken(installed: None, tmp_path: Path, tool: str) -> None:
    cib = tmp_path / "cib.xml"
    lines, third = commands(tool), commands(tool, "A third host")
    assert lines
    assert third
    typed(tool, [*lines, *third], cib)
    run(f"crm_verify --xml-file {cib}", cib)
    root = ET.parse(cib).getroot()
    [agent] = [each for each in root.iter("primitive") if each.get("provider") == "nbdkit"]
    assert agent.get("type") == "replication"
    values = {each.get("name"): each.get("value") for each in root.iter("nvpair")}
    wanted = {"node": "web1", "stonith-enabled": "true", "promotable": "true", "notify": "true", "interleave": "true"}
    assert values.items() >= wanted.items()
    [together] = root.iter("rsc_colocation")
    assert (together.get("rsc"), together.get("with-rsc"), together.get("with-rsc-role")) == (
        "vm",
        "disk-clone",
        "Promoted",
    )
    [order] = root.iter("rsc_order")
    assert (order.get("first"), order.get("first-action"), order.get("then")) == ("disk-clone", "promote", "vm")
    assert {each.get("node") for each in root.iter("rsc_location")} == {"hosta", "hostb", "hostc"}
    never = [each for each in root.iter("rsc_location") if each.get("resource-discovery") == "never"]
    assert {each.get("rsc") for each in never} == {"disk-clone", "vm"}
