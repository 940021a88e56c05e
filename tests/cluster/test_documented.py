# SPDX-License-Identifier: BSD-3-Clause
"""The commands of docs/cluster.md, typed into an empty configuration: crm and pcs take them, and so does Pacemaker."""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from checkout import REPOSITORY

COMMAND_S = 120


def run(command: str, cib: Path) -> str:
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "CIB_file": str(cib), "HOME": "/root"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("heading", "tool"), [("The cluster, with crm", "crm"), ("The same with pcs", "pcs")])
def test_the_commands_are_taken(installed: None, tmp_path: Path, heading: str, tool: str) -> None:
    text = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    block = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    cib = tmp_path / "cib.xml"
    cib.write_text(run("cibadmin --empty", cib))
    for line in block[1].replace("\\\n", " ").splitlines():
        assert line.startswith(f"{tool} ")
        run(line.replace("pcs ", f"pcs -f {cib} ", 1), cib)
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
    assert {each.get("node") for each in root.iter("rsc_location")} == {"hosta", "hostb"}
