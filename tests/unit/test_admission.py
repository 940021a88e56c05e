# SPDX-License-Identifier: BSD-3-Clause
"""When the guest is served: each reason by itself, which of several counts, and what ends each."""

from __future__ import annotations

import pytest

from replication import admission as admission_module
from replication.admission import Admission, Ownership
from replication.errors import CommandError
from replication.options import Fencing, OnOutdated, Options
from replication.order.latency import Latency
from replication.reason import Reason
from replication.stage import Mode

RUNNING = Ownership(True, True, None)
STOPPED = Ownership(True, False, None)
OUTDATED = Ownership(True, True, "x", "told")
SECONDARY = Ownership(False, False, None)


class Case:
    """An admission, and a node whose standing is told by hand."""

    def __init__(self, **options: object) -> None:
        self.now = RUNNING
        given = Options(Mode.PRIMARY, [], None, None)
        for name, value in options.items():
            setattr(given, name, value)
        self.clock_s = 1000.0
        self.admission = Admission(given, lambda: self.now, lambda: self.clock_s)

    @property
    def stands(self) -> str | None:
        """The key that says so, None if the guest is served."""
        why = self.admission.still.why
        return None if why is None else why.split("=")[0].split(":")[0]

    def is_now(self, ownership: Ownership) -> None:
        self.now = ownership
        self.admission.review()


def test_nothing_is_in_the_way() -> None:
    case = Case()
    case.admission.begin(True, True)
    assert case.stands is None
    case.admission.cut_off()
    assert case.stands is None, "fencing=dont-care"


@pytest.mark.parametrize(
    ("choice", "stands", "fails"),
    [(OnOutdated.CONTINUE, False, False), (OnOutdated.SUSPEND_IO, True, False), (OnOutdated.IO_ERROR, True, True)],
)
def test_an_outdated_owner(choice: OnOutdated, stands: bool, fails: bool) -> None:
    case = Case(on_outdated=choice)
    case.is_now(OUTDATED)
    assert (case.admission.still.on, case.admission.still.waits) == (stands, stands and not fails)
    case.is_now(SECONDARY._replace(outdated="x"))
    assert case.stands is None, "an outdated secondary refuses promotion; its guest face is no owner's"
    case.is_now(OUTDATED)
    case.admission.resume()
    assert case.stands is None
    case.admission.review()
    assert case.stands is None
    case.admission.learnt(Reason.TOLD)
    assert case.admission.still.on is stands


def test_what_is_new_stops_a_guest_again_that_somebody_has_let_go_on() -> None:
    case = Case()
    admission = case.admission
    case.is_now(OUTDATED)
    admission.resume()
    assert not admission.learnt(Reason.TOLD, again=True), "that was known when the guest was let go on"
    assert case.stands is None
    assert admission.learnt(Reason.PEER_PROMOTED, again=True)
    assert case.stands
    admission.resume()
    assert not admission.learnt(Reason.PEER_PROMOTED, again=True), "the link meets it every few seconds"
    assert case.stands is None
    admission.accepted()
    assert case.stands is None
    assert admission.learnt(Reason.PEER_PROMOTED, again=True), "another time"
    assert case.stands
    admission.resume()
    assert admission.learnt(Reason.TOLD), "who says it again means it"
    assert case.stands


@pytest.mark.parametrize("choice", list(OnOutdated), ids=lambda choice: choice.value)
def test_who_is_being_told_waits_and_fails_nothing_before_it_is_certain(choice: OnOutdated) -> None:
    case = Case(on_outdated=choice)
    with case.admission.hearing():
        assert case.admission.still.waits is (choice is not OnOutdated.CONTINUE)
        case.is_now(OUTDATED)
        assert case.admission.still.waits is (choice is not OnOutdated.CONTINUE)
        case.is_now(RUNNING)
    assert case.stands is None, "it was refused"
    case.is_now(SECONDARY)
    with case.admission.hearing():
        assert case.stands is None


def test_a_primary_that_was_started_again_waits_for_its_peer() -> None:
    case = Case(wfc_timeout_s=1000.0)
    case.admission.begin(True, False)
    assert case.stands is None, "it never had one"
    for goes_on in (case.admission.reached, case.admission.alone, case.admission.stopped, case.admission.resume):
        case.admission.begin(True, True)
        assert case.stands == "wfc-timeout"
        goes_on()
        assert case.stands is None


def test_a_lost_link() -> None:
    case = Case(fencing=Fencing.SUSPEND_IO)
    case.admission.begin(False, False)
    assert case.stands is None
    case.admission.cut_off()
    assert case.stands == "fencing"
    assert (case.admission.still.on, case.admission.still.reads_on) == (True, False)
    case.admission.reached()
    assert case.stands == "fencing"
    case.admission.linked(case.admission.losses)
    assert case.stands is None
    before = case.admission.losses
    case.admission.cut_off()
    case.admission.linked(before)
    assert case.stands == "fencing", "the link that came up is lost again"
    case.is_now(STOPPED)
    case.admission.stopped()
    assert case.stands is None, "it forwards no more"
    case.admission.cut_off()
    assert case.stands is None, "a link that is lost while it is let go"
    for goes_on in (case.admission.alone, case.admission.stopped, case.admission.resume):
        case.is_now(RUNNING)
        case.admission.cut_off()
        goes_on()
        assert case.stands is None


def test_each_loss_is_told_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(admission_module, "log", said.append)
    case = Case(fencing=Fencing.SUSPEND_IO)
    for _ in range(2):
        case.admission.cut_off()
        case.admission.tell()
        case.admission.linked(case.admission.losses)
    assert [line.split(":")[0] for line in said] == ["the guest stands still", "the guest goes on"] * 2


def test_a_peer_that_is_known_to_be_fenced_is_not_waited_for_when_its_loss_is_noticed_later() -> None:
    case = Case(fencing=Fencing.SUSPEND_IO)
    admission = case.admission
    before = admission.losses
    admission.resume()
    admission.cut_off()
    assert case.stands == "fencing", "nothing was said of the peer"
    admission.resume()
    before = admission.losses
    admission.resume(fenced=True)
    admission.linked(before)
    admission.cut_off()
    assert case.stands is None, "an agreement from before it was said"
    admission.cut_off()
    assert case.stands is None
    admission.linked(admission.losses)
    admission.cut_off()
    assert case.stands == "fencing", "the next agreement has ended it"
    admission.resume(fenced=True)
    assert case.stands is None
    with admission.demoting():
        with pytest.raises(CommandError, match="being made a secondary"):
            admission.resume(fenced=True)
        case.is_now(SECONDARY)
    case.is_now(RUNNING)
    admission.cut_off()
    assert case.stands == "fencing", "another role, another peer"


def test_a_refused_word_that_the_peer_is_fenced_changes_nothing() -> None:
    case = Case(fencing=Fencing.SUSPEND_IO, guest_face_closed=True)
    with pytest.raises(CommandError, match="closed-until-promoted"):
        case.admission.resume(fenced=True)
    case.admission.promoted()
    case.admission.cut_off()
    assert case.stands == "fencing"


def test_what_a_demotion_kept_back_stands_after_a_restart_as_well() -> None:
    case = Case(fencing=Fencing.SUSPEND_IO, wfc_timeout_s=1000.0)
    case.now = STOPPED
    case.admission.begin(False, False, kept_back=True)
    assert case.stands == "wfc-timeout"
    assert not case.admission.keeps_back
    with case.admission.demoting():
        assert case.admission.keeps_back
        case.admission.reached()
        assert case.admission.keeps_back
    assert case.stands == "fencing"
    case.admission.resume()
    with case.admission.demoting():
        assert not case.admission.keeps_back


def test_a_word_that_comes_after_a_demotion_opens_nothing() -> None:
    case = Case(guest_face_closed=True)
    case.is_now(SECONDARY)
    case.admission.promoted()
    assert case.admission.closed


def test_a_guest_face_that_is_closed() -> None:
    case = Case(guest_face_closed=True)
    case.admission.begin(False, False)
    assert case.admission.closed
    assert not case.admission.still.waits
    with pytest.raises(CommandError, match="closed-until-promoted"):
        case.admission.resume()
    case.admission.promoted()
    assert (case.admission.closed, case.stands) == (None, None)
    with case.admission.demoting():
        case.is_now(STOPPED)
    assert case.admission.closed is None, "it is an owner still"
    with case.admission.demoting():
        case.is_now(SECONDARY)
        assert case.admission.closed
    assert case.admission.closed
    assert case.admission.still.era == 1


@pytest.mark.parametrize("demoted", [True, False])
def test_a_guest_that_stands_still_does_not_go_on_while_its_node_is_demoted(demoted: bool) -> None:
    """The primary is stopped first, which ends the wait for fencing otherwise."""
    case = Case(fencing=Fencing.SUSPEND_IO, wfc_timeout_s=1000.0)
    case.admission.begin(True, True)
    assert case.stands == "wfc-timeout"
    with case.admission.demoting():
        case.now = STOPPED
        case.admission.stopped()
        assert case.stands == "wfc-timeout"
        case.admission.reached()
        assert case.stands == "wfc-timeout"
        with pytest.raises(CommandError, match="being made a secondary"):
            case.admission.resume()
        if demoted:
            case.is_now(SECONDARY)
            assert case.stands is None
    assert case.stands == (None if demoted else "fencing"), "it was stopped on the way to something else"
    assert case.admission.still.era == int(demoted)


def test_the_time_for_the_peer_is_longer_than_a_thread_sleeps() -> None:
    case = Case(wfc_timeout_s=5000.0)
    case.admission.begin(True, True)
    case.admission.launch()
    left_s = case.admission._peer_has_not_come()
    assert left_s is not None
    assert 0 < left_s <= 5000
    assert case.stands == "wfc-timeout"
    case.admission.reached()
    assert case.admission._peer_has_not_come() is None
    case.admission.close()


def test_the_time_for_the_peer_is_over() -> None:
    case = Case(wfc_timeout_s=0.01)
    case.admission.begin(True, True)
    stood = case.stands
    case.admission.launch()
    case.admission.still.stand(Latency(), 0, False, lambda: False)
    assert (stood, case.stands) == ("wfc-timeout", None)
    case.admission.close()


def test_a_lease() -> None:
    case = Case(lease_s=10.0)
    case.admission.begin(False, False)
    assert case.stands == "lease", "nothing was heard yet"
    case.admission.heard(1000.0)
    assert case.stands is None
    case.clock_s = 1010.0
    case.admission.heard(995.0)
    assert case.stands is None, "what was asked before is no later news"
    case.clock_s = 1010.1
    assert case.stands == "lease"
    assert case.admission.renew() == 10.0
    assert case.stands is None
    case.clock_s = 1021.0
    assert case.stands == "lease"
    case.admission.resume()
    assert case.stands is None
    case.clock_s = 1100.0
    assert case.stands is None, "somebody has said that the other node is fenced"
    case.admission.heard(1100.0)
    case.clock_s = 1111.0
    assert case.stands == "lease", "it was there again"
    case.is_now(STOPPED)
    assert case.stands is None
    with pytest.raises(CommandError, match="no lease to renew"):
        case.admission.renew()


def test_without_a_lease_nothing_looks_at_the_clock() -> None:
    case = Case()
    case.admission.begin(False, False)
    case.admission.heard(5.0)
    case.clock_s = 1e9
    assert not case.admission.still.on
    with pytest.raises(CommandError, match="no lease to renew"):
        case.admission.renew()


def test_the_lease_of_one_that_is_being_demoted_ends_with_its_good_bye() -> None:
    """What becomes of the demotion does not change that: the secondary may have failed over."""
    case = Case(lease_s=10.0)
    case.admission.begin(False, False)
    case.admission.heard(1000.0)
    with case.admission.demoting():
        assert case.admission.keeps_back
        case.now = STOPPED
        case.admission.stopped()
        assert case.stands == "lease"
        assert case.admission.keeps_back
    assert case.stands == "lease", "it could not be made a secondary"
    with pytest.raises(CommandError, match="no lease to renew"):
        case.admission.renew()
    assert case.stands == "lease", "the secondary waits for nothing"
    case.admission.stopped()
    case.clock_s = 1e6
    assert case.stands is None, "somebody has stopped it"


def test_a_lease_that_a_former_process_has_ended_in_a_demotion() -> None:
    case = Case(lease_s=10.0)
    case.now = STOPPED
    case.admission.begin(False, True, kept_back=True)
    assert case.stands == "lease"
    case.admission.resume()
    assert case.stands is None


def test_a_good_bye_ends_the_lease_until_the_next_agreement() -> None:
    case = Case(lease_s=10.0)
    case.admission.begin(False, False)
    case.admission.heard(1000.0)
    case.admission.leave()
    assert case.stands == "lease"
    case.admission.heard(1001.0)
    assert case.stands == "lease", "an answer that was under way"
    with pytest.raises(CommandError, match="said good-bye"):
        case.admission.renew()
    assert case.stands == "lease", "a cluster that knows nothing of the good-bye"
    case.admission.stay()
    case.admission.heard(1002.0)
    assert case.stands is None, "it has not taken the good-bye"
    case.admission.leave()
    case.admission.linked(0)
    case.admission.heard(1003.0)
    assert case.stands is None
    assert case.admission.renew() == 10.0


def test_who_knows_that_the_other_one_is_fenced_need_not_wait_for_the_end_of_the_lease() -> None:
    case = Case(lease_s=10.0)
    case.admission.begin(False, False)
    case.admission.heard(1000.0)
    case.admission.resume(fenced=True)
    case.admission.heard(1001.0)  # of before
    case.clock_s = 1e6
    assert case.stands is None
    case.admission.linked(case.admission.losses)
    assert case.stands == "lease"
    case.admission.alone()
    assert case.stands is None


def test_each_reason_has_a_code_and_whoever_listens_hears_of_it_once() -> None:
    told: list[str | None] = []
    now = RUNNING
    options = Options(Mode.PRIMARY, [], None, None)
    options.fencing, options.wfc_timeout_s, options.lease_s = Fencing.SUSPEND_IO, 60.0, 10.0
    clock_s = 1000.0
    admission = Admission(
        options, lambda: now, lambda: clock_s, lambda standing: told.append(standing and standing["code"])
    )
    admission.begin(True, True)
    admission.reached()
    admission.linked(0)
    admission.heard(1000.0)
    admission.review()
    clock_s = 1011.0
    admission.tell()
    now = OUTDATED
    admission.review()
    admission.resume()
    assert told == ["wfc-timeout", "fencing", "lease-over", None, "lease-over", "outdated", None]
    options.guest_face_closed = True
    closed = Admission(options, lambda: now)
    closed.begin(False, False)
    assert closed.standing is not None
    assert closed.standing["code"] == "not-promoted"
