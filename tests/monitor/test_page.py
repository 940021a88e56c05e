# SPDX-License-Identifier: BSD-3-Clause
"""The page in a real browser: what a person, a telephone, a keyboard and a screen reader get. `make test-monitor`.

With NBDKIT_REPLICATION_SCREENSHOTS=FOLDER the pictures are kept there.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser
from fakenode import FakeNode, status
from lab import Lab
from replication.monitor.access import make_access
from replication.monitor.fleet import Fleet, Found
from replication.monitor.journal import SAMPLE_S, Sample
from replication.monitor.web import WebServer
from waiting import DEADLINE_S, wait_until

COMMIT = {"id": "commit-disk0", "type": "commit", "status": "running"}
STALL = {
    "seconds": 2.5,
    "time": 0.0,
    "export": "disk0",
    "operation": "write",
    "reason": "queue-full",
    "text": "the forward queue was full",
    "under-way": False,
}
EVIL = "<img src=x onerror=document.title='evil'>"


class Host:
    """A monitor with a pair, a node in split brain, one whose commit is at work, and one that is gone."""

    def __init__(self, folder: Path) -> None:
        brain = {"state": "lost", "reason": "split brain: both sides have taken writes since they parted"}
        alone = {"node": "x", "peer-node": "y"}
        self.nodes = {
            "web": FakeNode(folder / "a", "primary", **{"longest-stall": STALL}).start(),
            "web-copy": FakeNode(folder / "b", "secondary").start(),
            "db": FakeNode(folder / "c", "primary", link=brain, **alone).start(),
            "mail": FakeNode(folder / "d", "secondary", stage="failover", **alone).start(),
        }
        self.commit(25)
        self.paths = {name: str(node.path) for name, node in self.nodes.items()} | {"gone": str(folder / "gone")}
        self.fleet = Fleet(lambda: Found(dict(self.paths)), rescan_s=0.1)
        self.fleet.start()
        wait_until(lambda: sum(watcher.sight.up for watcher in self.fleet.watchers()) == 4, "all are up")
        self._remember()
        self.server = WebServer(self.fleet, make_access("127.0.0.1:0"))
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/"

    def commit(self, part: int) -> None:
        job = COMMIT | {"current-progress": part << 20, "total-progress": 100 << 20}
        self.nodes["mail"].answers["query-jobs"] = [job]

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join(DEADLINE_S)
        self.server.server_close()
        self.fleet.stop()
        for node in self.nodes.values():
            node.die()

    def _remember(self) -> None:
        """An hour of samples, as if it had passed."""
        chance, now = random.Random(1), time.time()
        for watcher in self.fleet.watchers():
            if watcher.name == "gone":
                continue
            for number in range(700):
                moment = now - 3600 + number * SAMPLE_S
                rates = abs(chance.gauss(2e6, 1e6)), abs(chance.gauss(5e6, 2e6))
                duration = abs(chance.gauss(0.004, 0.001))
                watcher.journal._samples.append(Sample(moment, 1.0, *rates, 0.0, 0.0, 0.0, duration))


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    made = Host(lab.folder)
    yield made
    made.close()


def opened(lab: Lab, host: Host, name: str, width: int = 1280, height: int = 1100, dark: bool = False) -> Browser:
    """The page, complete; nothing on the console."""
    browser = lab.start(Browser(lab.folder, width, height, dark))
    browser.open(host.url)
    wait_until(lambda: "MONITOR_NODE_UP" in browser.text() and "written" in browser.text(), "the page is complete")
    if folder := os.environ.get("NBDKIT_REPLICATION_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png")
    assert browser.console() == []
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), (
        "it is wider than the window"
    )
    return browser


def test_what_a_person_sees_and_it_follows(lab: Lab, host: Host) -> None:
    browser = opened(lab, host, "wide")
    text = browser.text()
    assert "5 nodes: 2 protected, 1 to look at, 2 in trouble" in text
    for said in (
        "lost: split brain",
        "2.5 s write on disk0: the forward queue was full",
        "Does not answer: No such file or directory",
        "Failed over; the commit is at work",
        "25.0 MiB of 100.0 MiB",
        "loses the last ",
        "4.0 KiB in about 1.0 s",
        "disk0 hidden: 8.0 KiB of at most 1.0 GiB",
        "live",
    ):
        assert said in text, said
    pairs = browser.run("return [...document.querySelectorAll('.pair')].map((one) => one.ariaLabel)")
    assert "Pair web and web-copy" in pairs
    points = browser.run("return document.querySelector('polyline').getAttribute('points').split(' ').length")
    assert points >= 700

    host.commit(50)
    wait_until(lambda: "50.0 MiB of 100.0 MiB" in browser.text(), "the commit goes on")
    wait_until(lambda: " left" in browser.text(), "and its time left is known")
    host.nodes["web"].emit("REPLICATION_ERROR", case=8, desc=EVIL)
    wait_until(lambda: EVIL in browser.text(), "the event, as text")
    host.nodes["web"].answers["query-replication"] = status("primary", consistent=False)
    wait_until(lambda: "No valid checkpoint" in browser.text(), "the new state")
    del host.paths["gone"]
    wait_until(lambda: "4 nodes:" in browser.text(), "a node that is not configured any more goes")
    assert browser.run("return document.title") == "Replication"
    assert browser.console() == []


def test_on_a_telephone_and_in_the_dark(lab: Lab, host: Host) -> None:
    browser = opened(lab, host, "telephone", 390, 844, dark=True)
    colours = browser.run(
        "const s = getComputedStyle(document.querySelector('article')); return [s.backgroundColor, s.color]"
    )
    assert colours == ["rgb(22, 27, 34)", "rgb(230, 237, 243)"]
    sizes = browser.run(
        "return [...document.querySelectorAll('article')].map((one) => one.getBoundingClientRect().width)"
    )
    assert all(300 < size <= 390 for size in sizes)


def test_with_a_keyboard_and_a_screen_reader(lab: Lab, host: Host) -> None:
    browser = opened(lab, host, "keyboard")
    browser.press("\ue004")  # tab
    assert browser.run("return document.activeElement.textContent") == "To the nodes"
    browser.press("\ue007")  # enter
    assert browser.run("return document.activeElement.id") == "nodes"
    browser.press("\ue004")
    assert browser.run("return document.activeElement.textContent") == "/metrics"
    names = browser.run(
        "return [...document.querySelectorAll('svg, progress, meter, article, section')].map((one) =>"
        " one.ariaLabel || (one.labels && one.labels[0] && one.labels[0].textContent) ||"
        " document.getElementById(one.getAttribute('aria-labelledby'))?.textContent || one.outerHTML)"
    )
    assert names
    assert not [name for name in names if "<" in name]
    tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    said = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if "role" in node}
    assert ("heading", "Replication") in said
    assert ("article", "web") in said
    assert any(role == "image" and name.startswith("The last hour: written") for role, name in said)
    assert any(role == "progressbar" and name.startswith("commit-disk0") for role, name in said)
    assert any(role == "status" and "protected" in name for role, name in said) or ("status", "") in said
