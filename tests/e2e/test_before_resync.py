# SPDX-License-Identifier: BSD-3-Clause
"""before-resync-target on a real pair: a refused resync changes nothing and says so, and what it waits for holds up
nobody else. The handler is a script that looks at files of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from content import KIB, MIB, pattern
from lab import Lab
from nodes import Pair, drained, refused
from waiting import wait_until

OLD, NEW = pattern(1, MIB), pattern(2, MIB)


class Handler:
    """What the secondary asks: refuses while `refusing` is there, and does not answer while `holding` is."""

    def __init__(self, folder: Path) -> None:
        self.asked, self.refusing, self.holding = (folder / name for name in ("asked", "refusing", "holding"))
        self.config = folder / "handlers.toml"
        script = folder / "handler"
        script.write_text(
            "#!/bin/sh\n"
            f'echo "$NBDKIT_REPLICATION_VERDICT" >> {self.asked}\n'
            f"while [ -e {self.holding} ]; do sleep 0.02; done\n"
            f"[ ! -e {self.refusing} ] || {{ echo 'not before the backup'; exit 4; }}\n"
        )
        script.chmod(0o755)
        self.config.write_text(f'[[handler]]\nevent = "before-resync-target"\ncommand = "{script}"\ntimeout = 20\n')

    @property
    def questions(self) -> list[str]:
        return self.asked.read_text().split() if self.asked.exists() else []


class Bench:
    """A pair with different disks, whose secondary asks before it takes the primary's."""

    def __init__(self, lab: Lab) -> None:
        self.handler = Handler(lab.folder)
        self.pair: Pair = lab.pair(secondary_arguments=[f"config={self.handler.config}"])
        self.primary, self.secondary = self.pair.primary, self.pair.secondary
        self.guest = self.primary.connect("disk0")
        self.guest.pwrite(NEW, 0)

    def content(self) -> bytes:
        return self.secondary.disks[0].read_bytes()


@pytest.fixture
def bench(lab: Lab) -> Bench:
    return Bench(lab)


def test_a_first_copy_that_is_refused_changes_nothing_and_the_next_one_is_asked_again(bench: Bench) -> None:
    before = bench.content()
    bench.handler.refusing.touch()
    said = refused(bench.primary, "replication-start", {"sync": "full"})
    assert "before-resync-target: the handler" in said
    assert "refuses the resync with exit code 4: not before the backup. Replication has not begun" in said
    assert bench.primary.status()["stage"] == "none"
    assert bench.content() == before != NEW
    bench.handler.refusing.unlink()
    bench.primary.execute("replication-start", {"sync": "full"})
    drained(bench.primary)
    assert bench.content() == NEW
    assert bench.handler.questions == ["full", "full"]


def test_a_link_that_comes_back_is_refused_while_something_is_missing_and_not_for_ever(bench: Bench) -> None:
    bench.primary.execute("replication-start", {"sync": "full"})
    wait_until(lambda: drained(bench.primary)["link"]["state"] == "in-sync", "the first copy is complete")
    assert bench.handler.questions == ["full"]
    bench.secondary.kill()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "lost", "the link is lost")
    bench.guest.pwrite(OLD[: 4 * KIB], 0)
    bench.handler.refusing.touch()
    bench.secondary.start()
    wait_until(lambda: bench.primary.status()["link"].get("code") == "resync-refused", "the resync is refused")
    assert "not before the backup" in bench.primary.status()["link"]["reason"]
    assert bench.content() == NEW
    bench.handler.refusing.unlink()
    wait_until(lambda: bench.content() == OLD[: 4 * KIB] + NEW[4 * KIB :], "it is sent when it may be")
    wait_until(lambda: "code" not in bench.primary.status()["link"], "and the link has nothing to say")
    assert set(bench.handler.questions[1:]) == {"quick"}


def test_nothing_is_asked_where_nothing_is_missing(bench: Bench) -> None:
    bench.primary.execute("replication-start", {"sync": "full"})
    wait_until(lambda: drained(bench.primary)["link"]["state"] == "in-sync", "the first copy is complete")
    bench.handler.refusing.touch()
    bench.secondary.kill()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "lost", "the link is lost")
    bench.secondary.start()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "in-sync", "the link is up again")
    assert bench.handler.questions == ["full"]


def test_a_failover_does_not_wait_for_the_answer_and_the_resync_does_not_begin_behind_it(bench: Bench) -> None:
    bench.primary.execute("replication-start", {"sync": "full"})
    wait_until(lambda: drained(bench.primary)["link"]["state"] == "in-sync", "the first copy is complete")
    bench.secondary.start_replication()
    bench.primary.execute("replication-checkpoint")
    bench.secondary.kill()
    wait_until(lambda: bench.primary.status()["link"]["state"] == "lost", "the link is lost")
    bench.guest.pwrite(OLD, 0)
    bench.handler.holding.touch()
    bench.secondary.start()
    wait_until(lambda: bench.handler.questions == ["full", "quick"], "the handler is at work")
    bench.secondary.failover()
    bench.handler.holding.unlink()
    wait_until(lambda: bench.primary.status()["link"].get("code") == "not-secondary", "the primary learns of it")
    assert bench.content() == NEW, "the last checkpoint"
    assert bench.secondary.connect("top0").pread(MIB, 0) == NEW
