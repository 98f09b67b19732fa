"""The session machine: every (state, input) pair, and what each legal one does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.config import STALENESS_MAX, STEPS_MAX
from fedmezo_core.errors import DivergedError, FedMezoError, JournalBehindError, ProtocolError
from fedmezo_core.events import (
    Acknowledged,
    ApplyCommit,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    FinishedByCoordinator,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    RefusedByCoordinator,
    ReportWeights,
    Restored,
    SendAnswer,
    SendHello,
    SendUnable,
    SessionAction,
    SessionEvent,
    Ticket,
    Welcomed,
    Work,
)
from fedmezo_core.machines.session import (
    COMMITS_QUEUED_MAX,
    REASON_CHARS_MAX,
    SessionMachine,
    SessionState,
)
from fedmezo_core.records import Committed, Scalars, SeedRange

HEAD = hashlib.sha256(b"genesis").digest()


def commit_of(round_: int) -> CommitReceived:
    commit = Committed(round_, (SeedRange(round_ << 16, (0.5,)),), round_)
    return CommitReceived(commit, b"commit %d" % round_)


def work_of(round_: int, slot: int = 0, steps: int = 2) -> Work:
    first = (round_ << 32) + (slot << 16)
    return Work(tuple(range(first, first + steps)), 1e-6, 1e-3, want_digest=True)


def assigned_of(round_: int, *, epoch: int = 1, slot: int = 0, steps: int = 2) -> Assigned:
    return Assigned(Ticket(epoch, round_, slot), work_of(round_, slot, steps))


def measured_of(ticket: Ticket) -> Measured:
    return Measured(ticket, Scalars((1.0, 2.0), 0.7, 5, 24))


def answer_of(ticket: Ticket, loss: float | None = None) -> SendAnswer:
    return SendAnswer(ticket, Scalars((1.0, 2.0), loss, 5))


def online(
    round_: int = 0, epoch: int = 1, *, report_losses: bool = False, staleness_max: int = 0
) -> SessionMachine:
    machine = SessionMachine(round_, HEAD, report_losses=report_losses, staleness_max=staleness_max)
    machine.step(Connected())
    machine.step(Welcomed(epoch, round_))
    return machine


def reconnect(machine: SessionMachine, epoch: int) -> None:
    machine.step(Disconnected())
    machine.step(Connected())
    machine.step(Welcomed(epoch, machine.round))


# ---------------------------------------------------------------- every pair


def _offline() -> SessionMachine:
    return SessionMachine(0, HEAD, report_losses=False)


def _greeting() -> SessionMachine:
    machine = _offline()
    machine.step(Connected())
    return machine


def _measuring() -> SessionMachine:
    machine = online()
    machine.step(assigned_of(1))
    return machine


def _offline_measuring() -> SessionMachine:
    machine = _measuring()
    machine.step(Disconnected())
    return machine


def _greeting_measuring() -> SessionMachine:
    machine = _offline_measuring()
    machine.step(Connected())
    return machine


def _left() -> SessionMachine:
    machine = online()
    machine.step(FinishedByCoordinator(0))
    return machine


STATES: dict[str, Callable[[], SessionMachine]] = {
    "offline": _offline,
    "greeting": _greeting,
    "online": online,
    "measuring": _measuring,
    "offline, measuring": _offline_measuring,
    "greeting, measuring": _greeting_measuring,
    "left": _left,
}
TICKET = Ticket(1, 1, 0)
EVENTS: dict[str, SessionEvent] = {
    "connected": Connected(),
    "disconnected": Disconnected(),
    "welcomed": Welcomed(1, 0),
    "commit": commit_of(1),
    "assigned": assigned_of(1),
    "acknowledged": Acknowledged(TICKET),
    "refused": RefusedByCoordinator(TICKET, "ScalarError", "no."),
    "finished": FinishedByCoordinator(0),
    "measured": measured_of(TICKET),
    "failed": MeasureFailed(TICKET, "loss is nan"),
    "restored": Restored(3, b"r" * 32),
}
NONE: tuple[SessionAction, ...] = ()
LEGAL: dict[tuple[str, str], tuple[SessionAction, ...]] = {
    ("offline", "connected"): (SendHello(0, HEAD),),
    ("offline", "commit"): (ApplyCommit(commit_of(1).commit),),
    ("offline", "restored"): NONE,
    ("greeting", "welcomed"): NONE,
    ("greeting", "disconnected"): NONE,
    ("online", "disconnected"): NONE,
    ("online", "commit"): (ApplyCommit(commit_of(1).commit),),
    ("online", "assigned"): (Measure(TICKET, work_of(1)),),
    ("online", "acknowledged"): NONE,
    ("online", "refused"): NONE,
    ("online", "finished"): (ReportWeights(0), Leave()),
    ("measuring", "disconnected"): NONE,
    ("measuring", "commit"): NONE,
    ("measuring", "assigned"): NONE,
    ("measuring", "acknowledged"): NONE,
    ("measuring", "refused"): NONE,
    ("measuring", "finished"): NONE,
    ("measuring", "measured"): (answer_of(TICKET),),
    ("measuring", "failed"): (SendUnable(TICKET, "loss is nan"),),
    ("offline, measuring", "connected"): (SendHello(0, HEAD),),
    ("offline, measuring", "commit"): NONE,
    ("offline, measuring", "measured"): NONE,
    ("offline, measuring", "failed"): NONE,
    ("greeting, measuring", "disconnected"): NONE,
    ("greeting, measuring", "welcomed"): NONE,
    ("greeting, measuring", "measured"): NONE,
    ("greeting, measuring", "failed"): NONE,
    ("left", "disconnected"): NONE,
    ("left", "acknowledged"): NONE,
    ("left", "refused"): NONE,
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_and_input(state: str, event: str) -> None:
    machine = STATES[state]()
    before = deepcopy(vars(machine))
    wanted = LEGAL.get((state, event))
    if wanted is not None:
        assert machine.step(EVENTS[event]) == wanted
        return
    with pytest.raises(ProtocolError, match=r"\.$"):
        machine.step(EVENTS[event])
    assert vars(machine) == before, "a refused event changes nothing"


# ---------------------------------------------------------------- commits


def test_commits_chain_the_head() -> None:
    machine = online()
    head = HEAD
    for round_ in (1, 2, 3):
        event = commit_of(round_)
        assert machine.step(event) == (ApplyCommit(event.commit),)
        head = hashlib.sha256(head + event.record_bytes).digest()
        assert (machine.round, machine.head) == (round_, head)
    assert machine.step(commit_of(3)) == ()
    assert machine.step(commit_of(1)) == ()
    assert machine.head == head


def test_a_gap_and_a_rewritten_commit_are_refused() -> None:
    machine = online()
    machine.step(commit_of(1))
    with pytest.raises(ProtocolError, match="those in between are missing"):
        machine.step(commit_of(3))
    with pytest.raises(ProtocolError, match="other bytes than the first"):
        machine.step(CommitReceived(commit_of(1).commit, b"other"))
    assert machine.round == 1


@pytest.mark.parametrize(("epoch", "round_"), [(2, 4), (1, 5), (1, 9)])
def test_a_coordinator_that_went_back_is_never_followed(epoch: int, round_: int) -> None:
    machine = online(5, epoch=2)
    machine.step(Disconnected())
    machine.step(Connected())
    with pytest.raises(JournalBehindError, match="journal went back"):
        machine.step(Welcomed(epoch, round_))
    assert machine.state is SessionState.GREETING


def test_weights_never_change_under_a_measurement() -> None:
    machine = _measuring()
    assert machine.step(commit_of(1)) == ()
    assert machine.measuring_in_vain
    assert machine.step(assigned_of(2)) == ()
    # The answer to round 1 is worth nothing now; what waited comes out in order.
    assert machine.step(measured_of(TICKET)) == (
        ApplyCommit(commit_of(1).commit),
        Measure(Ticket(1, 2, 0), work_of(2)),
    )
    assert not machine.measuring_in_vain


def test_an_assignment_overtaken_by_its_commit_is_not_begun() -> None:
    machine = _measuring()
    machine.step(commit_of(1))
    machine.step(assigned_of(2))
    machine.step(commit_of(2))
    actions = machine.step(MeasureFailed(TICKET, "cut short"))
    assert actions == (ApplyCommit(commit_of(1).commit), ApplyCommit(commit_of(2).commit))
    assert not machine.measuring


def test_a_worker_hopelessly_behind_is_told_so() -> None:
    machine = _measuring()
    for round_ in range(1, COMMITS_QUEUED_MAX + 1):
        machine.step(commit_of(round_))
    with pytest.raises(ProtocolError, match="cut it short"):
        machine.step(commit_of(COMMITS_QUEUED_MAX + 1))
    actions = machine.step(MeasureFailed(TICKET, "cut short"))
    assert len(actions) == COMMITS_QUEUED_MAX
    assert machine.step(commit_of(COMMITS_QUEUED_MAX + 1))


def test_weights_from_a_snapshot_are_followed_by_the_next_commit_only() -> None:
    machine = _offline()
    machine.step(Restored(3, b"r" * 32))
    assert (machine.round, machine.head) == (3, b"r" * 32)
    assert machine.step(commit_of(3)) == ()
    with pytest.raises(ProtocolError, match="those in between are missing"):
        machine.step(commit_of(5))
    assert machine.step(commit_of(4)) == (ApplyCommit(commit_of(4).commit),)
    assert machine.head == hashlib.sha256(b"r" * 32 + commit_of(4).record_bytes).digest()
    with pytest.raises(ProtocolError, match="read the journal instead"):
        machine.step(Restored(4, b"r" * 32))


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("report_losses", [False, True])
def test_the_loss_leaves_only_if_the_run_says_so(report_losses: bool) -> None:
    machine = online(report_losses=report_losses)
    machine.step(assigned_of(1))
    [answer] = machine.step(measured_of(TICKET))
    assert answer == answer_of(TICKET, 0.7 if report_losses else None)


def test_the_same_work_again_is_answered_from_the_cache_under_the_new_ticket() -> None:
    machine = _measuring()
    machine.step(measured_of(TICKET))
    assert machine.step(assigned_of(1)) == (answer_of(TICKET),)
    reconnect(machine, epoch=2)
    assert machine.step(assigned_of(1, epoch=2)) == (answer_of(Ticket(2, 1, 0)),)


@pytest.mark.parametrize("change", ["slot", "steps", "round"])
def test_other_work_is_measured_anew(change: str) -> None:
    machine = _measuring()
    machine.step(measured_of(TICKET))
    if change == "round":
        machine.step(commit_of(1))
    event = {
        "slot": assigned_of(1, slot=3),
        "steps": assigned_of(1, steps=3),
        "round": assigned_of(2),
    }[change]
    [action] = machine.step(event)
    assert isinstance(action, Measure)


def test_work_assigned_again_while_it_runs_is_answered_under_the_newest_ticket() -> None:
    machine = _measuring()
    reconnect(machine, epoch=2)
    assert machine.step(assigned_of(1, epoch=2)) == ()
    assert machine.step(measured_of(TICKET)) == (answer_of(Ticket(2, 1, 0)),)


def test_a_failure_is_reported_under_the_newest_ticket_too() -> None:
    machine = _measuring()
    reconnect(machine, epoch=2)
    machine.step(assigned_of(1, epoch=2))
    [unable] = machine.step(MeasureFailed(TICKET, "x" * 1000))
    assert unable == SendUnable(Ticket(2, 1, 0), "x" * REASON_CHARS_MAX)


def test_a_measurement_of_another_epoch_waits_to_be_asked_for() -> None:
    machine = _measuring()
    reconnect(machine, epoch=2)
    assert machine.step(measured_of(TICKET)) == ()
    assert machine.step(assigned_of(1, epoch=2)) == (answer_of(Ticket(2, 1, 0)),)


def test_a_measurement_that_ended_offline_is_kept() -> None:
    machine = _offline_measuring()
    assert machine.step(measured_of(TICKET)) == ()
    machine.step(Connected())
    machine.step(Welcomed(1, 0))
    assert machine.step(assigned_of(1)) == (answer_of(TICKET),)


def test_other_work_in_the_same_round_waits_for_the_running_one() -> None:
    machine = _measuring()
    assert machine.step(assigned_of(1, slot=3)) == ()
    actions = machine.step(measured_of(TICKET))
    assert actions == (
        answer_of(TICKET),
        Measure(Ticket(1, 1, 3), work_of(1, 3)),
    )


def test_work_that_waits_is_forgotten_with_its_stream() -> None:
    machine = _measuring()
    machine.step(assigned_of(1, slot=3))
    machine.step(Disconnected())
    assert machine.step(measured_of(TICKET)) == ()
    assert not machine.measuring


@pytest.mark.parametrize(
    "event",
    [
        assigned_of(2),
        assigned_of(0),
        assigned_of(1, epoch=2),
        assigned_of(1, epoch=0),
        assigned_of(1, steps=0),
        assigned_of(1, steps=STEPS_MAX + 1),
    ],
)
def test_a_wrong_assignment_is_refused(event: Assigned) -> None:
    machine = online()
    with pytest.raises(ProtocolError, match=r"assigned.*\.$"):
        machine.step(event)
    assert not machine.measuring


def test_a_measurement_nobody_asked_for_is_refused() -> None:
    machine = _measuring()
    with pytest.raises(ProtocolError, match="not the one running"):
        machine.step(measured_of(Ticket(1, 1, 7)))
    assert machine.measuring


def test_refusals_are_kept_except_of_stale_tickets() -> None:
    machine = online()
    machine.step(RefusedByCoordinator(TICKET, "StaleTicketError", "late."))
    assert machine.refusal is None
    refused = RefusedByCoordinator(TICKET, "ScalarError", "too large.")
    machine.step(refused)
    assert machine.refusal == refused


# ---------------------------------------------------------------- the end


def test_the_end_waits_for_the_measurement_and_the_commits() -> None:
    machine = _measuring()
    machine.step(commit_of(1))
    assert machine.step(FinishedByCoordinator(1)) == ()
    assert machine.step(measured_of(TICKET)) == (
        ApplyCommit(commit_of(1).commit),
        ReportWeights(1),
        Leave(),
    )
    assert machine.state is SessionState.LEFT


def test_the_end_replaces_work_that_waits() -> None:
    machine = _measuring()
    machine.step(assigned_of(1, slot=3))
    machine.step(FinishedByCoordinator(0))
    actions = machine.step(MeasureFailed(TICKET, "cut short"))
    assert actions == (ReportWeights(0), Leave()), "what was cut short for the end is no complaint"


def test_an_end_that_was_not_reached_is_said_again_in_the_next_session() -> None:
    machine = _measuring()
    machine.step(commit_of(1))
    machine.step(FinishedByCoordinator(1))
    machine.step(Disconnected())
    assert machine.step(measured_of(TICKET)) == (ApplyCommit(commit_of(1).commit),)
    machine.step(Connected())
    machine.step(Welcomed(1, 1))
    assert machine.step(FinishedByCoordinator(1)) == (ReportWeights(1), Leave())


@pytest.mark.parametrize("round_", [0, 2])
def test_an_end_at_another_round_is_refused(round_: int) -> None:
    machine = online()
    machine.step(commit_of(1))
    with pytest.raises(ProtocolError, match="catch up"):
        machine.step(FinishedByCoordinator(round_))


# ---------------------------------------------------------------- buffered runs


def test_a_commit_does_not_make_a_buffered_measurement_worthless() -> None:
    machine = online(staleness_max=2)
    machine.step(assigned_of(1))
    machine.step(commit_of(1))
    machine.step(commit_of(2))
    assert not machine.measuring_in_vain
    actions = machine.step(measured_of(TICKET))
    assert actions == (
        answer_of(TICKET),
        ApplyCommit(commit_of(1).commit),
        ApplyCommit(commit_of(2).commit),
    )
    [action] = machine.step(assigned_of(3))
    assert isinstance(action, Measure)


def test_a_buffered_measurement_that_is_too_old_is_dropped() -> None:
    machine = online(staleness_max=1)
    machine.step(assigned_of(1))
    machine.step(commit_of(1))
    machine.step(commit_of(2))
    assert machine.measuring_in_vain
    machine.step(assigned_of(3))
    assert machine.step(MeasureFailed(TICKET, "cut short")) == (
        ApplyCommit(commit_of(1).commit),
        ApplyCommit(commit_of(2).commit),
        Measure(Ticket(1, 3, 0), work_of(3)),
    )


def test_a_buffered_measurement_is_answered_in_a_later_session() -> None:
    machine = online(staleness_max=3)
    machine.step(assigned_of(1))
    reconnect(machine, epoch=2)
    machine.step(commit_of(1))
    assert machine.step(assigned_of(1, epoch=2)) == ()
    actions = machine.step(measured_of(TICKET))
    assert actions == (answer_of(Ticket(2, 1, 0)), ApplyCommit(commit_of(1).commit))
    # The answer was lost with the stream: it is kept until it is too old.
    reconnect(machine, epoch=3)
    assert machine.step(assigned_of(1, epoch=3)) == (answer_of(Ticket(3, 1, 0)),)


def test_work_whose_weights_are_gone_is_given_back() -> None:
    machine = online(1, staleness_max=3)
    [unable] = machine.step(assigned_of(1))
    assert isinstance(unable, SendUnable)
    assert "the weights before round 1 are no longer held" in unable.reason
    assert not machine.measuring


def test_buffered_work_that_is_overtaken_while_it_waits_is_given_back() -> None:
    machine = online(staleness_max=1)
    machine.step(assigned_of(1))
    machine.step(commit_of(1))
    machine.step(commit_of(2))
    machine.step(assigned_of(3))
    machine.step(commit_of(3))
    *applied, unable = machine.step(MeasureFailed(TICKET, "cut short"))
    assert applied == [ApplyCommit(commit_of(n).commit) for n in (1, 2, 3)]
    assert isinstance(unable, SendUnable)
    assert unable.ticket == Ticket(1, 3, 0)


@pytest.mark.parametrize("round_", [1, 5])
def test_buffered_work_of_another_time_is_refused(round_: int) -> None:
    machine = online(3, staleness_max=2)
    with pytest.raises(ProtocolError, match=r"assigned.*\.$"):
        machine.step(assigned_of(round_))


def test_commits_that_wait_for_a_buffered_measurement_have_a_limit() -> None:
    machine = online(staleness_max=STALENESS_MAX)
    machine.step(assigned_of(1))
    for round_ in range(1, COMMITS_QUEUED_MAX + 1):
        machine.step(commit_of(round_))
        assert machine.measuring_in_vain is (round_ > STALENESS_MAX)
    with pytest.raises(ProtocolError, match="cut it short"):
        machine.step(commit_of(COMMITS_QUEUED_MAX + 1))


def test_the_end_of_a_buffered_run_cuts_a_measurement_short() -> None:
    machine = online(staleness_max=3)
    machine.step(assigned_of(1))
    machine.step(commit_of(1))
    assert not machine.measuring_in_vain
    machine.step(FinishedByCoordinator(1))
    assert machine.measuring_in_vain


# ---------------------------------------------------------------- any order at all

tickets = st.builds(Ticket, st.integers(1, 2), st.integers(0, 3), st.integers(0, 1))
any_event = st.one_of(
    st.just(Connected()),
    st.just(Disconnected()),
    st.builds(Welcomed, st.integers(1, 2), st.integers(0, 3)),
    st.builds(commit_of, st.integers(1, 4)),
    st.builds(
        lambda ticket: assigned_of(ticket.round, epoch=ticket.epoch, slot=ticket.slot), tickets
    ),
    st.builds(Acknowledged, tickets),
    st.builds(RefusedByCoordinator, tickets, st.just("ScalarError"), st.just("no.")),
    st.builds(FinishedByCoordinator, st.integers(0, 4)),
    st.builds(measured_of, tickets),
    st.builds(MeasureFailed, tickets, st.just("no.")),
)


@given(st.lists(any_event, max_size=40), st.sampled_from([0, 1, 2]))
def test_any_sequence_acts_in_order_or_is_refused_without_a_trace(
    events: list[SessionEvent], staleness_max: int
) -> None:
    machine = SessionMachine(0, HEAD, report_losses=False, staleness_max=staleness_max)
    applied, running = 0, False
    for event in events:
        if isinstance(event, Measured | MeasureFailed) and machine._running is not None:
            # Half of these would name a measurement that does not run.
            event = measured_of(machine._running.given)
            running = False
        before = deepcopy(vars(machine))
        try:
            actions = machine.step(event)
        except FedMezoError:
            assert vars(machine) == before
            continue
        for action in actions:
            match action:
                case ApplyCommit(commit):
                    assert not running, "weights changed under a measurement"
                    assert commit.round == applied + 1, "a commit out of order"
                    applied = commit.round
                case Measure(ticket):
                    assert not running, "two measurements at once"
                    assert ticket.round == applied + 1 == machine.round + 1
                    running = True
                case SendAnswer(ticket) | SendUnable(ticket):
                    # Before the step: the last answer may come with the leave.
                    assert before["state"] is SessionState.ONLINE
                    assert ticket.epoch == machine.epoch
                    assert 0 <= machine.round + 1 - ticket.round <= staleness_max
                case ReportWeights(round_):
                    assert round_ == applied
                case _:
                    pass
        assert running == machine.measuring


# ---------------------------------------------------------------- heads


def head_at(round_: int) -> bytes:
    """The head after the commits of `commit_of`."""
    head = HEAD
    for number in range(1, round_ + 1):
        head = hashlib.sha256(head + commit_of(number).record_bytes).digest()
    return head


def test_an_answer_names_the_head_that_it_was_measured_at_where_no_digest_says_more() -> None:
    machine = online()
    machine.step(commit_of(1))
    assigned = assigned_of(2)
    machine.step(assigned)
    [answer] = machine.step(Measured(assigned.ticket, Scalars((1.0, 2.0), 0.7, None, 24)))
    assert isinstance(answer, SendAnswer)
    assert answer.head64 == int.from_bytes(head_at(1)[:8], "little")


@pytest.mark.parametrize("welcomed_at", [1, 2])
def test_a_welcome_binds_the_coordinator_to_the_head_that_it_names(welcomed_at: int) -> None:
    machine = SessionMachine(0, HEAD, report_losses=False)
    machine.step(commit_of(1))
    machine.step(Connected())
    if welcomed_at == 1:
        with pytest.raises(DivergedError, match="history up to round 1 is not the one"):
            machine.step(Welcomed(1, 1, b"x" * 32))
        machine.step(Welcomed(1, 1, head_at(1)))
        return
    machine.step(Welcomed(1, 2, b"x" * 32))
    before = deepcopy(machine)
    with pytest.raises(DivergedError, match="history up to round 2 is not the one"):
        machine.step(commit_of(2))
    assert (machine.round, machine.head) == (before.round, before.head), "nothing was applied"


@pytest.mark.parametrize("round_", [1, 2])
def test_an_acknowledgement_of_another_history_is_refused(round_: int) -> None:
    machine = online()
    machine.step(commit_of(1))
    ticket = Ticket(1, round_, 0)
    machine.step(Acknowledged(ticket, head_at(round_ - 1)))
    with pytest.raises(DivergedError, match=f"history up to round {round_ - 1} is not the one"):
        machine.step(Acknowledged(ticket, b"x" * 32))
