# SPDX-License-Identifier: BSD-3-Clause
"""Every text of the product that tells somebody what to do; following it overwrites nothing that nobody gave up.

The texts are read off the sources, so a new one that is not in the table fails tests/unit/test_docs.py. A row is a
piece of the text, the states in which it can be printed, and either the test that follows it (a file and a name, which
must be there) or the reason why there is nothing to follow that could lose data.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from checkout import REPOSITORY

VERBS = (
    "resync|use|run|give|type|start|stop|try|remove|bring|move|copy|make|put|let|decide|repeat|repair|check|commit|"
    "connect|retry|discard|fail over|upgrade|truncate|dismiss|call|pass|force|compile|ask|set"
)
ADVISING = re.compile(
    rf"(?:^|[;:,.?] |\bor |\band |\bthen |\bnow )(?:{VERBS})\b"
    r"|`replctl|\b(?:is|are) needed\b|\bbefore a full resync\b|systemctl|qemu-img create|\bfirst$",
    re.IGNORECASE,
)
"""What an imperative looks like. It finds some texts that advise nothing; they are in the table as such."""

LEFT_OUT = ("demo", "monitor")
"""Parts that print no errors of the product: a demonstration on disks of its own, and a page of what nodes say."""


def texts(path: Path) -> Iterator[str]:
    """The texts in a source, `{}` for what is put in; without docstrings."""
    tree = ast.parse(path.read_text())
    passed: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            passed |= {id(each.value) for each in body if isinstance(each, ast.Expr)}
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in passed:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def advising() -> dict[str, str]:
    """Where each advising text is, by text."""
    found = {}
    for path in sorted((REPOSITORY / "replication").rglob("*.py")):
        where = path.relative_to(REPOSITORY / "replication")
        if where.parts[0] not in LEFT_OUT:
            found.update({text: str(where) for text in texts(path) if " " in text and ADVISING.search(text)})
    return found


NOTHING = "nothing is to be done to a disk, an image or a state folder"
LATER = "the same command again, which by test_no_return.py has changed nothing before"
LINEAGE = "e2e/test_lineage.py::test_table"

TABLE = [
    # a piece of the text; where it is printed; the test that follows it, or why it needs none
    # -- two nodes that meet
    ("split brain: both sides", "a start or a link, with any two lineages", LINEAGE),
    (
        "decide whose writes are to be thrown away: replctl discard",
        "the cluster's agent, on the node of a split brain that is not promoted",
        "e2e/test_cluster_agent.py::test_split_brain_stays_down_and_says_so",
    ),
    (
        "decide whose writes are to be thrown away, and have that node demoted",
        "the cluster's agent, on both nodes of a split brain of which the register cannot tell the newer one",
        "e2e/test_cluster_agent.py::test_a_register_that_does_not_know_the_last_promotion_judges_nobody",
    ),
    ("the secondary has newer data", "the same", LINEAGE),
    ("the two sides have nothing in common", "the same", LINEAGE),
    ("are an unfinished copy of another primary's", "a start of a half-copied node", LINEAGE),
    ("is another secondary than it was: stop, then start", "a link that comes back", LINEAGE),
    ("a full resync from the primary is needed", "a checkpoint, running", "e2e/test_recovery.py"),
    ("no valid checkpoint before a full resync", "a checkpoint or stop, running", "e2e/test_recovery.py"),
    ("a resync is needed", "a checkpoint of a primary: what it has is newer by lineage", LINEAGE),
    ("no local disk to send them from", "a link of an export that only forwards", "e2e/test_plain_secondary.py"),
    (
        "no local disk to send: copy it, then start with sync=none",
        "a start of such an export",
        "a person has copied what is to be equal; a refusal by lineage comes before (dial.py)",
    ),
    ("give the key secondary=URI", "a start without an address", LINEAGE),
    ("control export cannot be opened: try again", "a start", LATER),
    ("has not ended yet; try again", "a start", LATER),
    ("has not come back yet; try again", "a start", LATER),
    # -- growth
    ("The secondary is not connected: it has to grow first", "resize without a link", LATER),
    (
        "cannot be told to grow: stop, grow both disks, then resize, then start",
        "resize with a plain NBD server",
        "sizes that differ are refused, and what is newer has the local disk (dial.py)",
    ),
    (
        "Give the command again when it is there",
        "resize, the link is lost meanwhile",
        "e2e/test_resize.py::test_a_kill_costs_nothing_and_the_command_is_given_again",
    ),
    (
        "what was added is not used before `replctl resize`",
        "the log of a start with a grown disk",
        "e2e/test_resize.py::test_a_node_that_starts_with_a_grown_disk_serves_the_former_size",
    ),
    (
        "when the disks of both nodes were grown, `replctl NAME resize`",
        "doctor, where the disk is larger than its state folder knows",
        "e2e/test_resize.py::test_a_node_that_starts_with_a_grown_disk_serves_the_former_size",
    ),
    (
        "which is of the present size: end it first",
        "resize while a test runs",
        "e2e/test_resize.py::test_what_is_refused_has_changed_nothing",
    ),
    (
        "resize there, which grows both",
        "resize of a secondary whose primary is connected",
        "e2e/test_resize.py::test_what_is_refused_has_changed_nothing",
    ),
    ("What a former resize was making is not ready yet: try again", "resize after a failover that failed", LATER),
    ("The former link has not ended yet: try again", "resize, a secondary that does not answer", LATER),
    ("A disk has grown meanwhile: try again", "the start of a test during a resize", LATER),
    # -- discard
    ("run discard on the node whose changes", "discard on a primary", LINEAGE),
    ("make it a secondary first", "discard on an owner; then lineage decides", LINEAGE),
    (
        "or give the last checkpoint up with `replctl discard --checkpoint`",
        "hidden is full; refused without a primary that has the content",
        "e2e/test_discard_checkpoint.py::test_a_checkpoint_that_is_good_for_something_is_kept",
    ),
    # -- leaving a stage
    ("resync from the primary, or use force to take", "failover, running", "e2e/test_recovery.py"),
    (
        "resynchronise it from the node that has gone on, or use force",
        "failover or stop of an outdated node",
        "e2e/test_roles.py::test_demote_outdates_and_force_takes_what_is_there",
    ),
    (
        "try again then, or say that it is fenced (fenced, --fenced) if it is known to be dead",
        "failover or stop while the lease of the primary lasts",
        "e2e/test_lease.py::test_the_secondary_takes_the_disks_when_the_lease_is_over",
    ),
    (
        "is connected; demote it first",
        "promotion, running",
        "e2e/test_roles.py::test_a_role_from_every_state_and_back",
    ),
    (
        "The commit cannot go on",
        "retry, failover-failed: the guest has gone on here, so there is no word of the primary",
        "e2e/test_advice.py::test_after_a_failover_nobody_is_told_to_copy_from_the_primary_or_to_remove_anything",
    ),
    (
        "or use force: then this process fails over",
        "failover, the state folder hangs",
        "e2e/test_hanging_state.py::test_an_unsaved_failover_is_undone_by_a_kill_and_nothing_is_lost",
    ),
    ("Try again when the storage of the state folder answers", "failover, the state folder hangs", LATER),
    ("are empty, and the primary sends everything", "failover with force", LATER),
    ("does not answer; try again", "failover, beside a step that hangs", LATER),
    ("Another change of role is at work: try again", "a change of role, beside another one", LATER),
    ("attempt to reach the peer has not ended: try again", "demote, done", LATER),
    (
        "have the primary send the rest, or use force",
        "promote, none",
        "e2e/test_roles.py::test_half_a_first_copy_is_not_started_by_a_promotion",
    ),
    ("Replication goes on, but {}; try again", "the failover of a primary", LATER),
    (
        "This moves the disk to the secondary while the guest goes on",
        "switchover --live, before anything is done",
        "e2e/test_follow_owner.py::test_the_disk_moves_under_a_guest_that_goes_on_and_back",
    ),
    (
        "migrate it there first, or stop it and switch over without --live",
        "switchover --live, running, with no guest on the secondary",
        "e2e/test_follow_owner.py::test_the_disk_moves_under_a_guest_that_goes_on_and_back",
    ),
    (
        "and the guest goes on there, but nothing replicates it yet",
        "switchover --live, done: the disk has moved, and the former primary is stopped, or a secondary",
        "e2e/test_follow_owner.py::test_a_switch_over_that_was_cut_off_is_finished_by_a_second_one",
    ),
    (
        "by a move with --live that was cut off; nothing has changed",
        "switchover --live, both done: compare only reads",
        "e2e/test_follow_owner.py::test_what_is_over_is_no_move_to_finish_when_both_have_gone_on",
    ),
    (
        "end it and start it anew, or let it in with `replctl resume-io`",
        "follow-owner, a guest whose disk was rolled back, or whose node was demoted, attaches again",
        "e2e/test_follow_owner.py::test_a_failover_ends_the_guest_whose_disk_goes_back",
    ),
    ("emptying the overlays: {}; try again", "failover with force", LATER),
    ("requests are in flight: {}; try again", "failover without a thread", LATER),
    ("try again in stage done", "start, failover", LATER),
    ("start it with mode=secondary and its top-id", "demote of a primary, any stage", LINEAGE),
    ("did not end what it sends within {} s: stop it first", "the stop of a secondary", LINEAGE),
    ("commit or abort it first", "checkpoint, an epoch is held; the former checkpoint stays", NOTHING),
    # -- switch-over
    ("Repeat the switch-over to finish it", "it was cut off", "e2e/test_switchover_cut.py::judge"),
    ("Repeat the switch-over when it answers", "it was cut off", "e2e/test_switchover_cut.py::judge"),
    ("then repeat the switch-over", "half-way, the guest has written: the start sends that", LINEAGE),
    ("the guest still writes to the primary", "switch-over", NOTHING),
    # -- files
    (
        "is gone, and with it what the failover has not brought down yet",
        "opening, failover and failover-failed",
        "e2e/test_advice.py::"
        "test_an_image_that_is_gone_is_not_to_be_copied_anew_from_the_primary_when_this_node_owns_the_disk",
    ),
    (
        "is gone, and with it the last checkpoint: bring it back",
        "opening, running, the same boot",
        "unit/secondary/test_images.py::test_in_the_same_boot_a_missing_image_is_refused_and_may_come_back",
    ),
    (
        ". The disk has writes that no other node has",
        "the same, after a demote",
        "unit/secondary/test_images.py::test_of_a_disk_with_own_writes_nobody_is_told_to_copy_another_over_it",
    ),
    (
        "copy the disk anew from the primary",
        "the same, of a disk that its primary has as well",
        "unit/secondary/test_images.py::test_of_a_disk_with_own_writes_nobody_is_told_to_copy_another_over_it",
    ),
    (
        "bring back the one or remove the other",
        "opening; from stage running on a copy comes first",
        "unit/secondary/test_images.py::test_an_image_that_may_be_needed_is_to_be_copied_before_it_is_removed",
    ),
    (
        "is corrupt: {}; remove it",
        "opening; from stage running on a copy comes first",
        "unit/secondary/test_images.py::test_an_image_that_may_be_needed_is_to_be_copied_before_it_is_removed",
    ),
    ("What it holds is lost with that", "opening, a person's own image perhaps", "it says what is lost"),
    (
        "repair it with qemu-img check",
        "opening; from stage running on a copy comes first",
        "unit/secondary/test_images.py::test_an_image_that_may_be_needed_is_to_be_copied_before_it_is_removed",
    ),
    (
        "/epoch is not a file of this program; move it away",
        "opening, any stage",
        "e2e/test_advice.py::test_an_owner_whose_state_was_moved_away_to_start_anew_is_not_overwritten",
    ),
    (
        "is not a state file of this program",
        "opening, any stage; it says that a copy comes first",
        "e2e/test_advice.py::test_an_owner_whose_state_was_moved_away_to_start_anew_is_not_overwritten",
    ),
    (
        "or use another folder, with other disks",
        "mode=primary for a secondary's folder, before done: its overlays belong to its disks",
        "e2e/test_advice.py::test_after_a_failover_nobody_is_told_to_copy_from_the_primary_or_to_remove_anything",
    ),
    (
        "the change map would be wrong: remove it",
        "the log; a map that is missing means everything",
        "e2e/test_spoiled_folder.py::test_a_primary_that_does_not_know_what_its_secondary_lacks_sends_everything",
    ),
    ("put it on a disk, or use durability=process", "opening with durability=power", "e2e/test_durability.py"),
    ("there is a file in the way that is no socket", "control=; it says that the file may be somebody's", NOTHING),
    ("give a shorter one with control=PATH", "control=", NOTHING),
    # -- replctl
    ("It cannot be undone. Copy what you need of it first", "before discard, which asks", LINEAGE),
    ("Make sure first that the guest does not run", "before promotion, which asks", NOTHING),
    ("Stop the guest on the primary first", "before switch-over, which asks", "e2e/test_switchover.py"),
    ("owns the disk now; start the guest there", "after switch-over", NOTHING),
    ("now start the primary with it", "after demote; lineage decides", LINEAGE),
    ("`replctl jobs --watch`", "after failover and retry", NOTHING),
    ("use --yes", "a question that nobody can be asked", "it asks what --yes says; the command is the same"),
    ("Type yes to go on", "a question", "the same"),
    (
        "make it, as large as on the other host",
        "doctor, where no state folder knows the disk",
        "unit/replctl/test_doctor.py::test_a_disk_that_a_state_folder_knows_is_not_to_be_made_anew",
    ),
    (
        "bring it back (is its file system mounted?)",
        "doctor, where a state folder knows the disk",
        "unit/replctl/test_doctor.py::test_a_disk_that_a_state_folder_knows_is_not_to_be_made_anew",
    ),
    (
        "stop the secondary, truncate -s",
        "doctor, the sizes differ",
        "unit/replctl/test_doctor.py::test_what_a_primary_sees_of_its_secondary",
    ),
    (
        "bring back the size that it had; or, for a disk of another size, move",
        "doctor, where the disk has another size than its state folder knows; lineage decides afterwards",
        "unit/replctl/test_doctor.py::test_a_secondary_whose_disk_got_another_size_starts_when_the_advice_was_followed",
    ),
    ("start replication on the primary", "doctor; lineage decides", LINEAGE),
    ("start the secondary there", "doctor: the service", NOTHING),
    ("start --sync full", "init, a new node; no start gets around a refusal", LINEAGE),
    ("truncate -s SIZE {disks}", "init, says that it is for new disks", NOTHING),
    ("change it with an editor, or remove it", "init: the file of a node, not its state", NOTHING),
    ("put the overlays on a disk", "doctor, with durability=power they are refused as they are", NOTHING),
    ("put state on a disk", "doctor: a folder in memory", "e2e/test_spoiled_folder.py"),
    ("make room there", "doctor", NOTHING),
    ("`replctl status` shows how far", "after verify", NOTHING),
    ("are sent by the next `replctl checkpoint`", "verify, of a pair that runs: the secondary's are copies", LINEAGE),
]

HARMLESS = (
    "are needed, but both are {}",
    "the uncompiled ones run; compile again",
    "requires TLS: use an nbds: URI",
    "give QEMU the key as in its manual",
    "say where the node listens: --uri URI",
    "name another place of the node with --uri",
    "does the secondary require TLS?",
    "tls-psk are two ways to the same end",
    "let only the other host through the firewall",
    "make both again, as in docs/security.md",
    "put client-cert.pem",
    "put it into /etc/hosts",
    "let both hosts take the time",
    "upgrade the older one",
    "tells no digests of its disk: upgrade it first",
    "remove them, or upgrade to Debian 13",
    "use a Debian from 12 on",
    "use Linux 4.13",
    "systemctl enable --now nbdkit-replication@{}; journalctl",
    "# systemctl restart nbdkit-replication@{}",
    "let nobody else reach it (firewall, TLS)",
    "give each node a port of its own",
    "call its table [disk.{}], too",
    "use letters, digits and _ . + -",
    "put it after its disk=",
    "follow-owner=true opens what guest-face=closed-until-promoted closes",
    "requests of a former connection have not ended: try again",
    "use --control SOCKET",
    ", or use --json",
    "does not listen: use ListenStream=",
    "Parameter 'size' is of one disk: give 'disk' as well",
)
"""Advice about software, addresses, keys and command lines: nothing of it touches a disk or what is known of one."""

NO_ADVICE = (
    "stop and copy",
    "a failover has come first",
    "shared and discard are true or false",
    "discard --checkpoint",
    "copy-before-write was {}",
    "takes no writes: copy-before-write has ended",
    "Copy-before-write has ended with that",
    "start replication",
    "let the guest start also where",
    "let one in that comes by live migration",
    "stop replication as planned",
    "make the node the owner of its disks",
    "let a guest go on that stands still",
    "make the node a secondary, from any state",
    "lock the primary out and make this",
    "drain and stop the primary, then make",
    "check the file of a node",
    "check the node as a plugin of Nagios",
    "give up the last checkpoint, for a resync",
    "repeat until all have ended",
    "systemctl start {}: {}",
    "repeat every SECONDS",
    "repeat so often",
    "give up the comparison that is under way",
    "bytes to compare in a second",
    "its name, from `replctl jobs`",
    "use what disks have grown by",
)
"""What only looks like it: names of commands, their help, and what is the case."""


def unknown() -> list[str]:
    """The advising texts that nobody has put into the table, with where they are."""
    known = [row[0] for row in TABLE] + [*HARMLESS, *NO_ADVICE]
    return [f"{where}: {text}" for text, where in advising().items() if not any(piece in text for piece in known)]
