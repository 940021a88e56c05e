# SPDX-License-Identifier: BSD-3-Clause
"""A peer that lies: whatever it says, the node is as good as before afterwards, for an honest one and over a restart.

Each line of a table is one lie. What the node makes of it is free (it refuses, or takes it); what is held is that it
answers within its deadlines, starts again from its state folder, pairs, gets in sync, takes checkpoints, and counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkout import PLUGIN
from content import KIB, MIB, pattern, whole
from fakeprimary import FakePrimary
from lab import Lab
from nodes import Primary, Secondary
from qmp import QmpError
from replication.record.state import EPOCH_MAX, FOREIGN_MAX, Record
from waiting import wait_until

LONG = "x" * 100_000
IDS = [f"{number:016x}" for number in range(1, 40)]
NODE = "a" * 16


def usable(primary: Primary, secondary: Secondary, fill: int) -> None:
    """Both start again, replicate, and take two checkpoints whose numbers follow each other."""
    for node in (primary, secondary):
        if node.running:
            node.kill()
    secondary.start()
    primary.start()
    if secondary.status()["stage"] == "none":
        secondary.execute("replication-start")
    if primary.status()["stage"] == "none":
        primary.execute("replication-start")
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", f"in sync: {primary.status()['link']}")
    guest = primary.connect("disk0")
    guest.pwrite(pattern(fill, 4 * KIB), fill * 4 * KIB)
    first = primary.checkpoint()["epoch"]
    assert primary.checkpoint()["epoch"] == first + 1 < 1 << 53
    assert whole(secondary.connect("top0")) == whole(guest)


def answered(action: Callable[[], object]) -> bool:
    """Do it; whether it was not refused. No refusal may be a defect."""
    try:
        action()
    except QmpError as error:
        if "Internal error" in error.desc:
            raise AssertionError(error.desc) from error
        return False
    return True


def noticed(primary: Primary, lie: dict[str, Any]) -> None:
    """Wait until the primary has made something of what its secondary says of itself; of some it makes nothing."""
    if "consistent" in lie:
        wait_until(lambda: primary.status()["error"] is not None, f"an error: {lie}")
    else:
        wait_until(lambda: primary.status()["link"]["state"] != "in-sync", f"not in sync: {lie}")


# -- a primary that lies -----------------------------------------------------------------------------------------


def own(secondary: Secondary) -> dict[str, Any]:
    """The lineage that it has on disk."""
    lineage: dict[str, Any] = json.loads((secondary.state / "state.json").read_text())["lineage"] or {}
    return lineage


def lie_about_numbers(fake: FakePrimary, _secondary: Secondary) -> None:
    for epoch in (EPOCH_MAX - 1, FOREIGN_MAX + 1, 1 << 63, -1, 1.5):
        told(fake, "replication-pair", node=NODE, lineage=LINEAGE, disks={"disk0": MIB}, epoch=epoch, timeout=60)
        token = paired(fake)
        for verdict in ("equal", "complete"):
            told(fake, "replication-pair-sync", token=token, verdict=verdict, generation=IDS[0], marked=False)
        told(fake, "replication-checkpoint", token=token, epoch=epoch)


def lie_about_generations(fake: FakePrimary, secondary: Secondary) -> None:
    known = own(secondary)
    current, history = known.get("current") or IDS[0], known.get("history") or []
    generations = ("", "0" * 16, LONG, IDS[0].upper() + "x", current, *history[:1])
    for generation in generations:
        for verdict in ("equal", "quick", "full", "complete"):
            token = paired(fake)
            for past in ([], [generation], IDS, [IDS[5]] * 2):
                told(
                    fake,
                    "replication-pair-sync",
                    token=token,
                    verdict=verdict,
                    generation=generation,
                    history=past,
                    marked=verdict == "full",
                )
                told(fake, "replication-checkpoint", token=token, epoch=1)
            saved = json.loads((secondary.state / "state.json").read_text())
            Record.from_json({name: saved[name] for name in saved if name not in ("serial", "checksum")})


def lie_about_itself(fake: FakePrimary, _secondary: Secondary) -> None:
    for lie in (
        {"node": LONG},
        {"node": ""},
        {"lineage": {**LINEAGE, "shared": True}},
        {"lineage": {**LINEAGE, "current": IDS[0], "history": IDS}},
        {"disks": {LONG: MIB}},
        {"disks": {"disk0": (1 << 62) - 1}},
        {"timeout": 1e-300},
        {"timeout": 3600},
    ):
        honest = {"node": NODE, "lineage": LINEAGE, "disks": {"disk0": MIB}, "epoch": 0, "timeout": 60}
        told(fake, "replication-pair", **{**honest, **lie})


LINEAGE: dict[str, Any] = {
    "current": "",
    "base": "",
    "shared": False,
    "incoming": "",
    "history": [],
    "discard": False,
}


def told(fake: FakePrimary, command: str, **arguments: object) -> None:
    """Say it; the answer may be an error, but none that is a defect."""
    answered(lambda: fake.call(command, **arguments))


def paired(fake: FakePrimary) -> str:
    """A session; its token, of none when it is refused."""
    try:
        return fake.pair()
    except QmpError:
        return "0"


@pytest.mark.parametrize("stage", ["none", "running"])
@pytest.mark.parametrize("lie", [lie_about_numbers, lie_about_generations, lie_about_itself])
def test_no_word_of_a_primary_makes_a_secondary_unusable(lab: Lab, lie: Any, stage: str) -> None:
    secondary = lab.secondary()
    if stage == "running":
        secondary.execute("replication-start")
    fake = FakePrimary(secondary, NODE, MIB)
    lie(fake, secondary)
    fake.close()
    wait_until(lambda: secondary.status()["link"]["primary"] is None, "the secondary has no session")
    secondary.kill()
    secondary.start()
    known = own(secondary)
    if known.get("current"):
        secondary.execute("replication-discard")  # a person: what that primary has left is of no use
    primary = lab.primary(secondary.uri(), name="honest")
    usable(primary, secondary, 1)


# -- a secondary that lies ---------------------------------------------------------------------------------------

LIAR = """
import builtins, json, sys
sys.path[:0] = [{repository!r}]
__file__ = {plugin!r}
exec(compile(builtins.open(__file__).read(), __file__, "exec"))
from replication.control import qmp
from replication.node import Node

def lying(answer, name):
    with builtins.open({lies!r}) as file:
        lies = json.load(file)
    if name in lies:
        answer = {{**answer, **lies[name]}} if isinstance(lies[name], dict) else lies[name]
    return answer

def patched(name, member):
    honest = getattr(Node, member)
    setattr(Node, member, lambda self, *arguments: lying(honest(self, *arguments), name))

for name, member in (("pair", "pair"), ("map", "pair_map"), ("status", "query")):
    patched(name, member)
taken = Node.checkpoint_of_primary
Node.checkpoint_of_primary = lambda self, *arguments: (
    lying({{"epoch": taken(self, *arguments)[0]}}, "checkpoint").get("epoch"), 0.0)
encode = qmp.encode
# What no honest JSON has: @...@ goes without quotes.
qmp.encode = lambda message: encode(message).replace(b'"@', b"").replace(b'@"', b"")
"""


class Liar(Secondary):
    """A secondary that answers as `lies` says: by what it answers, the members that are not so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lies = folder / "lies.json"
        self._script = folder / "liar.py"
        self._script.write_text(LIAR.format(repository=str(PLUGIN.parent), plugin=str(PLUGIN), lies=str(self._lies)))
        self.tell({})

    def tell(self, lies: dict[str, Any]) -> None:
        """From now on."""
        fresh = self._lies.with_suffix(".new")
        fresh.write_text(json.dumps(lies))
        fresh.replace(self._lies)

    def command(self) -> list[str]:
        return [str(self._script) if part == str(PLUGIN) else part for part in super().command()]


NUMBERS: tuple[Any, ...] = (EPOCH_MAX - 1, EPOCH_MAX, 1 << 63, -1, 1.5, "@1e999@", "@NaN@", "7", None, [], True)
IN_PAIR: list[dict[str, Any]] = [
    *({"epoch": number} for number in NUMBERS),
    *({"token": token} for token in ("", LONG, "a/../b", "a:b", 7, None, {})),
    *({"node": node} for node in ("", LONG, NODE.upper(), 7, None, [])),
    *({"lineage": lineage} for lineage in ({}, [], LONG, {**LINEAGE, "shared": True}, {**LINEAGE, "current": LONG})),
    {"stage": [LONG], "durability": {}, "batches": LONG},
]


@pytest.fixture
def liar(lab: Lab) -> Liar:
    return lab.start(Liar(lab.folder))


def test_no_agreement_with_a_secondary_makes_a_primary_unusable(lab: Lab, liar: Liar) -> None:
    primary = lab.primary(liar.uri())
    liar.execute("replication-start")
    for lie in IN_PAIR:
        liar.tell({"pair": lie})
        answered(lambda: primary.execute("replication-start"))
        if primary.status()["stage"] != "none":
            break
    liar.tell({})
    usable(primary, liar, 1)


def test_no_change_map_of_a_secondary_makes_a_primary_unusable(lab: Lab, liar: Liar) -> None:
    """Nor keeps it waiting: a map that never ends is refused when it is found to be one."""
    primary = lab.primary(liar.uri())
    usable(primary, liar, 1)
    for lie in (
        *({"next": number} for number in (0, 1, 64 * KIB, *NUMBERS)),
        {"ranges": [[0, 1 << 63]]},
        {"ranges": [[-1, 5]]},
        {"ranges": [[0.5, 1]]},
        {"ranges": [[0]]},
        {"ranges": LONG},
        {"ranges": None},
    ):
        primary.kill()
        liar.tell({"map": lie})
        primary.start()
        wait_until(lambda: primary.status()["link"]["state"] in ("lost", "in-sync"), f"an attempt has ended: {lie}")
        assert "internal error" not in str(primary.status()["link"]["reason"]).lower(), lie
    liar.tell({})
    usable(primary, liar, 2)


def test_no_answer_to_a_checkpoint_makes_a_primary_unusable(lab: Lab, liar: Liar) -> None:
    primary = lab.primary(liar.uri())
    usable(primary, liar, 1)
    for number in NUMBERS:
        liar.tell({"checkpoint": {"epoch": number}})
        if not answered(primary.checkpoint):
            liar.tell({})
            wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is up again")
    liar.tell({})
    usable(primary, liar, 2)


def test_nothing_that_a_secondary_says_of_itself_makes_a_primary_unusable(lab: Lab, liar: Liar) -> None:
    primary = lab.primary(liar.uri())
    usable(primary, liar, 1)
    for lie in (
        {"mode": LONG, "stage": {}},
        {"link": LONG},
        {"link": {"primary": [LONG]}},
        {"consistent": LONG},
        {"checkpoint-obstacle": [LONG]},
    ):
        liar.tell({"status": lie})
        noticed(primary, lie)
        liar.tell({})
        wait_until(lambda: primary.status()["link"]["state"] == "in-sync", f"well again after {lie}")
    usable(primary, liar, 2)


def test_a_control_client_names_a_secondary_no_longer_than_the_record_has_room_for(lab: Lab) -> None:
    pair = lab.pair()
    with pytest.raises(QmpError, match="characters"):
        pair.primary.execute("replication-start", secondary=pair.secondary.uri() + "&x=" + "y" * 500_000)
    for command, arguments in (
        ("job-cancel", {"id": LONG}),
        ("replication-checkpoint-commit", {"epoch": 1 << 63}),
        ("replication-checkpoint-abort", {"epoch": -1}),
    ):
        with pytest.raises(QmpError):
            pair.primary.execute(command, arguments)
    usable(pair.primary, pair.secondary, 1)
