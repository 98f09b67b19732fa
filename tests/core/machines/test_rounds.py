"""The round machine, decision by decision."""

from __future__ import annotations

import math

import pytest

from fedmezo_core.config import COHORT_MAX
from fedmezo_core.errors import JournalCorruptError, JournalError
from fedmezo_core.events import (
    Ack,
    AnswerReceived,
    Assign,
    Expel,
    Finish,
    Ready,
    Refuse,
    ReplicaEvaluated,
    Ticket,
    WeightsReported,
    Work,
    WorkerReady,
)
from fedmezo_core.machines.aggregate import to_binary32
from fedmezo_core.machines.roster import (
    AGAIN_AFTER_ROUNDS,
    COMPLAINT_CHARS_MAX,
    RECENT_ROUNDS_MAX,
    Phase,
)
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import DIGESTS_KEPT_MAX, RunState
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Record,
    Scalars,
    SeedRange,
    Started,
    first_seed_of,
    rounding_seed_of,
)
from tests.core.machines.rounds_driver import (
    TRUE_DIGEST64,
    WRONG_DIGEST64,
    RoundsDriver,
    config_of,
    expelled,
    full,
    kinds,
    refusal,
)


def assigned(ready: Ready) -> dict[str, Ticket]:
    return {m.worker: m.ticket for m in ready.messages if isinstance(m, Assign)}


def work_of(run: RoundsDriver, slot: int) -> Work:
    """What `slot` of round 1 is asked for."""
    first, config = first_seed_of(run.config.seed, 1, slot), run.config
    return Work((first, first + 1), config.learning_rate, config.eps, want_digest=True)


# ---------------------------------------------------------------- opening


def test_a_round_opens_when_enough_workers_are_ready() -> None:
    run = RoundsDriver(workers_min=2)
    assert run.ready("b") == Ready()
    assert run.machine.phase is Phase.WAITING
    assert run.closes_at_ms is None
    run.tick(300)
    ready = run.ready("a")
    assert ready.records == (Opened(1, 0, ("a", "b")),)
    assert ready.messages == tuple(
        Assign(
            worker=worker,
            ticket=Ticket(1, 1, slot),
            work=work_of(run, slot),
            deadline_ms=1000,
        )
        for slot, worker in enumerate("ab")
    )
    assert run.machine.phase.value == "open"
    assert run.closes_at_ms == 1300
    assert run.machine.roster.awaited == run.machine.cohort == ("a", "b")


def test_a_cohort_is_at_most_its_size_and_late_workers_wait_for_the_next_round() -> None:
    run = RoundsDriver(workers_min=5, cohort_size_max=3)
    ready = run.ready("a", "b", "c", "d", "e")
    assert len(run.machine.cohort) == 3
    chosen = assigned(ready)
    assert run.ready("f") == Ready()
    for worker in list(chosen)[:2]:
        assert kinds(run.answer(worker)) == ["Answered", "Ack"]
    last = run.answer(list(chosen)[2])
    assert kinds(last)[:3] == ["Answered", "Committed", "Opened"]


def test_digests_are_wanted_every_so_many_rounds() -> None:
    run = RoundsDriver(digest_every_rounds=2, rounds=5)
    wanted = []
    ready = run.ready("a")
    while run.machine.phase is not Phase.FINISHED:
        wanted += [m.work.want_digest for m in ready.messages if isinstance(m, Assign)]
        ready = run.answer("a")
    assert wanted == [True, False, True, False, True]


# ---------------------------------------------------------------- answers


def test_an_answer_is_recorded_then_acknowledged() -> None:
    run = RoundsDriver(workers_min=2, report_losses=True)
    run.ready("a", "b")
    ready = run.answer("b", grads=(0.1, 3.0), loss=0.7)
    assert ready.records == (
        Answered(1, 1, Scalars((to_binary32(0.1), 3.0), to_binary32(0.7), TRUE_DIGEST64)),
    )
    assert ready.messages == (Ack("b", Ticket(1, 1, 1)),)
    assert run.machine.roster.awaited == ("a",)
    assert run.machine.roster.workers["b"].mean_loss == to_binary32(0.7)


def test_the_same_answer_again_is_acknowledged_again_and_another_is_refused() -> None:
    run = RoundsDriver(workers_min=2, quorum=2)
    run.ready("a", "b")
    run.answer("a", grads=(0.0, 1.0))
    again = run.answer("a", grads=(0.0, 1.0))
    assert again == Ready(messages=(Ack("a", Ticket(1, 1, 0)),))
    assert refusal(run.answer("a", grads=(-0.0, 1.0))) == "EquivocationError"
    assert refusal(run.answer("a", grads=(0.0, 1.0), digest=9)) == "EquivocationError"
    run.answer("b")
    assert run.machine.round == 1
    # The round is committed; a lost acknowledgement can still be had.
    again = run.answer("a", 0, grads=(0.0, 1.0), round_=1)
    assert again == Ready(messages=(Ack("a", Ticket(1, 1, 0)),))
    assert refusal(run.answer("a", 0, grads=(0.5, 1.0), round_=1)) == "EquivocationError"
    run.answer("a")
    run.answer("b")
    assert refusal(run.answer("a", 0, grads=(0.0, 1.0), round_=1)) == "StaleTicketError"


def test_the_last_rounds_acknowledgement_can_be_had_after_a_restart_under_its_own_ticket() -> None:
    run = RoundsDriver(rounds=1)
    run.ready("a")
    run.answer("a")
    run.restart()
    run.ready("a")
    assert kinds(run.answer("a", 0, epoch=1, round_=1)) == ["Ack"]
    assert refusal(run.answer("a", 0, epoch=2, round_=1)) == "StaleTicketError"


@pytest.mark.parametrize(
    ("ticket", "why"),
    [
        ({"epoch": 1}, "another epoch"),
        ({"epoch": 3}, "an epoch to come"),
        ({"round_": 2}, "a round to come"),
        ({"round_": 0}, "no round"),
        ({"slot": 1}, "another worker's slot"),
        ({"slot": 2}, "no slot"),
        ({"slot": -1}, "no slot"),
    ],
)
def test_a_stale_ticket_is_refused_and_changes_nothing(ticket: dict[str, int], why: str) -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.restart()
    run.ready("a", "b")
    before = run.folded()
    assert refusal(run.answer("a", **ticket)) == "StaleTicketError", why  # type: ignore[arg-type]
    assert refusal(run.unable("a", **ticket)) == "StaleTicketError", why  # type: ignore[arg-type]
    assert run.machine.state == before
    assert run.machine.roster.awaited == ("a", "b")
    assert run.machine.roster.workers["a"].complaint == "", "a stale ticket is no fault"


def test_an_answer_that_missed_the_commit_is_stale() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    run.tick(1000)
    assert run.machine.round == 1
    assert refusal(run.answer("b", 1, round_=1)) == "StaleTicketError"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"grads": (1.0,)}, "ScalarError"),
        ({"grads": (1.0, 2.0, 3.0)}, "ScalarError"),
        ({"grads": ()}, "ScalarError"),
        ({"grads": (1.0, math.nan)}, "ScalarError"),
        ({"grads": (1.0, math.inf)}, "ScalarError"),
        ({"grads": (1.0, -100.1)}, "ScalarError"),
        ({"loss": 0.5}, "ProtocolError"),
        ({"digest": None}, "ProtocolError"),
        ({"digest": -1}, "ProtocolError"),
        ({"digest": 2**64}, "ProtocolError"),
    ],
)
def test_a_malformed_answer_is_refused_and_a_sound_one_still_counts(
    answer: dict[str, object], reason: str
) -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    assert refusal(run.answer("a", **answer)) == reason  # type: ignore[arg-type]
    assert "a" in run.machine.roster.workers["a"].complaint
    assert run.machine.roster.awaited == ("a", "b")
    assert kinds(run.answer("a")) == ["Answered", "Ack"]


def test_a_refusal_names_the_value_and_the_way_out() -> None:
    run = RoundsDriver()
    run.ready("a")
    [message] = run.answer("a", grads=(1.0, 250.0)).messages
    assert isinstance(message, Refuse)
    assert message.message == (
        "Worker a, round 1, slot 0: projected gradient 1 is 250.0, but must be finite and at most "
        "100.0 in size; clamp it to projected_grad_abs_max, or answer that it cannot be measured."
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e39])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    run = RoundsDriver(report_losses=True)
    run.ready("a")
    assert refusal(run.answer("a", loss=loss)) == "ScalarError"


def test_a_scalar_whose_coefficient_would_overflow_is_refused() -> None:
    run = RoundsDriver(learning_rate=1e9, projected_grad_abs_max=1e300)
    run.ready("a")
    assert refusal(run.answer("a", grads=(1.0, 1e30))) == "ScalarError"
    assert refusal(run.answer("a", grads=(1.0, 1e200))) == "ScalarError"
    assert "Committed" in kinds(run.answer("a", grads=(1.0, -1e8)))


def test_a_digest_that_nobody_asked_for_is_left_out() -> None:
    run = RoundsDriver(digest_every_rounds=2)
    run.ready("a")
    run.answer("a")
    assert run.machine.state.open is not None
    ticket = Ticket(1, 2, 0)
    ready = run.machine.step(AnswerReceived("a", ticket, Scalars((1.0, 2.0), None, 77)))
    assert ready.records[0] == Answered(2, 0, Scalars((1.0, 2.0), None, None))


@pytest.mark.parametrize("leave", [False, True])
def test_nobody_answers_without_a_session(leave: bool) -> None:
    run = RoundsDriver()
    if leave:
        run.ready("a")
        run.lost("a")
    assert refusal(run.answer("a")) == "UnknownWorkerError"
    assert refusal(run.unable("a")) == "UnknownWorkerError"


# ---------------------------------------------------------------- committing


def test_a_commit_is_the_mean_of_the_answers_in_slot_order() -> None:
    run = RoundsDriver(workers_min=2, report_losses=True)
    run.ready("a", "b")
    run.answer("b", grads=(4.0, 8.0), loss=2.0)
    ready = run.answer("a", grads=(1.0, -2.0), loss=1.0)
    assert ready.records[1] == Committed(
        1,
        (
            SeedRange(first_seed_of(run.config.seed, 1, 0), (-0.25, 0.5)),
            SeedRange(first_seed_of(run.config.seed, 1, 1), (-1.0, -2.0)),
        ),
        rounding_seed_of(run.config.seed, 1),
    )
    assert kinds(ready) == ["Answered", "Committed", "Opened", "Ack", "Assign", "Assign"]
    [summary] = run.machine.state.recent_rounds
    assert (summary.round, summary.mean_loss, summary.answers) == (1, 1.5, 2)
    assert run.machine.roster.workers["a"].rounds_answered == 1


def test_a_commit_is_the_mean_over_the_probes_too() -> None:
    run = RoundsDriver(workers_min=2, probes=2)
    [first, _] = [m for m in run.ready("a", "b").messages if isinstance(m, Assign)]
    assert len(first.work.seeds) == 4
    run.answer("a", grads=(1.0, -2.0, 4.0, 8.0))
    commit = run.answer("b", grads=(16.0, 0.0, 1.0, 1.0)).records[1]
    assert isinstance(commit, Committed)
    assert [one.coefficients for one in commit.seed_ranges] == [
        (-0.125, 0.25, -0.5, -1.0),
        (-2.0, -0.0, -0.125, -0.125),
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_an_answer_has_a_projected_gradient_for_each_probe_of_each_step(count: int) -> None:
    run = RoundsDriver(probes=2)
    run.ready("a")
    ready = run.answer("a", grads=(1.0,) * count)
    assert refusal(ready) == "ScalarError"
    [refused] = ready.messages
    assert isinstance(refused, Refuse)
    assert "2 local steps of 2 probes; send 4, one for each probe of each step." in refused.message


def test_the_last_commit_finishes_everyone_and_later_comers_too() -> None:
    run = RoundsDriver(workers_min=2, rounds=1)
    run.ready("a", "b")
    run.answer("a")
    ready = run.answer("b")
    assert ready.messages == (Ack("b", Ticket(1, 1, 1)), Finish("a", 1), Finish("b", 1))
    assert run.machine.phase is Phase.FINISHED
    assert run.ready("c").messages == (Finish("c", 1),)
    run.restart()
    assert run.ready("a").messages == (Finish("a", 1),)
    assert run.tick(10**9) == Ready()


def test_at_the_deadline_the_quorum_is_enough() -> None:
    run = RoundsDriver(workers_min=3, quorum=2)
    run.ready("a", "b", "c")
    run.answer("a")
    run.answer("c")
    assert run.tick(999) == Ready()
    assert kinds(run.tick(1000))[:2] == ["Committed", "Opened"]
    commit = run.records[-2]
    assert isinstance(commit, Committed)
    assert len(commit.seed_ranges) == 2


def test_time_never_goes_back() -> None:
    run = RoundsDriver(workers_min=2)
    run.tick(700)
    run.tick(100)
    run.ready("a", "b")
    assert run.closes_at_ms == 1700
    run.answer("a")
    run.tick(100)
    assert run.tick(1699) == Ready()
    assert run.tick(1700).records


def test_a_worker_that_left_keeps_its_slot_and_is_waited_for_once_it_is_back() -> None:
    run = RoundsDriver(workers_min=3, quorum=2)
    run.ready("a", "b", "c")
    assert run.lost("b") == Ready()
    assert run.ready("b").messages[0] == Assign("b", Ticket(1, 1, 1), work_of(run, 1), 1000)
    run.answer("a")
    run.answer("c")
    assert run.machine.round == 0
    assert kinds(run.answer("b"))[:2] == ["Answered", "Committed"]


def test_a_worker_that_left_is_not_waited_for() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    assert kinds(run.lost("b")) == ["Committed"]
    assert run.machine.roster.awaited == ()


def test_after_a_restart_workers_get_a_deadline_to_come_back() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    run.restart()
    assert run.tick(999) == Ready()
    assert kinds(run.tick(1000)) == ["Committed"]


def rounds_with_a_silent_worker(run: RoundsDriver, rounds: int, now_ms: int = 0) -> list[int]:
    """Milliseconds that each round takes if everybody but "silent" answers after 10 of them."""
    taken_ms = []
    for _ in range(rounds):
        begin_ms, round_ = now_ms, run.machine.round
        now_ms += 10
        run.tick(now_ms)
        for worker in ("a", "b", "c"):
            if worker in run.machine.roster.awaited and run.machine.round == round_:
                run.answer(worker)
        if run.machine.round == round_:
            now_ms = begin_ms + 1000
            run.tick(now_ms)
        assert run.machine.round == round_ + 1
        taken_ms.append(now_ms - begin_ms)
    return taken_ms


@pytest.mark.parametrize("cohort_size_max", [2, 4])
def test_a_worker_that_stays_silent_costs_one_deadline_and_is_then_chosen_last(
    cohort_size_max: int,
) -> None:
    run = RoundsDriver(workers_min=4, quorum=1, rounds=30, cohort_size_max=cohort_size_max, seed=3)
    run.ready("a", "b", "c", "silent")
    taken_ms = rounds_with_a_silent_worker(run, 20)
    assert sorted(taken_ms) == [10] * 19 + [1000]
    later = [record for record in run.records if isinstance(record, Opened)][10:]
    assert all(("silent" in record.workers) == (cohort_size_max == 4) for record in later)


def test_a_worker_that_joins_again_after_each_silence_costs_two_deadlines() -> None:
    run = RoundsDriver(workers_min=4, quorum=1, rounds=30)
    run.ready("a", "b", "c", "silent")
    taken_ms: list[int] = []
    for _ in range(20):
        taken_ms += rounds_with_a_silent_worker(run, 1, sum(taken_ms))
        run.lost("silent")
        run.ready("silent")
    assert sorted(taken_ms) == [10] * 18 + [1000] * 2


@pytest.mark.parametrize("back", ["answers in time", "joins again"])
def test_a_worker_that_was_silent_is_waited_for_again(back: str) -> None:
    run = RoundsDriver(workers_min=4, quorum=1, rounds=30)
    run.ready("a", "b", "c", "silent")
    rounds_with_a_silent_worker(run, 2)
    if back == "answers in time":
        run.answer("silent")
    else:
        run.lost("silent")
        run.ready("silent")
    for worker in ("a", "b", "c"):
        run.answer(worker)
    assert run.machine.round == (3 if back == "answers in time" else 2)
    if back == "joins again":
        run.answer("silent")
    for worker in ("a", "b", "c"):
        run.answer(worker)
    assert run.machine.round == 3
    run.answer("silent")
    assert run.machine.round == 4


def test_a_worker_that_is_slower_than_the_others_counts_again_after_one_miss() -> None:
    run = RoundsDriver(workers_min=3, quorum=1, rounds=80, deadline_ms=1000)
    run.ready("a", "b", "slow")
    ends_ms: dict[str, tuple[int, int]] = {}
    counted: list[int] = []
    for now_ms in range(0, 100_000, 20):
        run.tick(now_ms)
        for worker, (round_, end_ms) in list(ends_ms.items()):
            if now_ms < end_ms:
                continue
            del ends_ms[worker]
            # A worker does not send what was measured in vain.
            if round_ == run.machine.round + 1:
                run.answer(worker)
                counted += [round_] if worker == "slow" else []
        for worker in run.machine.roster.awaited:
            round_ = run.machine.roster.assignments[worker].round
            takes_ms = 400 if worker != "slow" else 1500 if round_ == 1 else 500
            ends_ms.setdefault(worker, (round_, now_ms + takes_ms))
        if run.machine.round == 80:
            break
    assert counted == list(range(1 + AGAIN_AFTER_ROUNDS, 81))


def test_who_stays_silent_is_waited_for_less_and_less() -> None:
    run = RoundsDriver(workers_min=4, quorum=1, rounds=300)
    run.ready("a", "b", "c", "silent")
    taken_ms = rounds_with_a_silent_worker(run, 300)
    waited = [round_ for round_, ms in enumerate(taken_ms, start=1) if ms == 1000]
    assert waited == [1, 33, 97, 225]


def test_below_quorum_the_silent_are_asked_again_and_needed() -> None:
    run = RoundsDriver(workers_min=3, quorum=3)
    run.ready("a", "b", "silent")
    run.answer("a")
    run.answer("b")
    assert assigned(run.tick(1000)) == {"silent": Ticket(1, 1, 2)}
    assert kinds(run.answer("silent"))[:2] == ["Answered", "Committed"]


def test_the_unable_are_not_waited_for() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    assert run.unable("b", reason="loss is nan" * 100) == Ready()
    assert len(run.machine.roster.workers["b"].complaint) == COMPLAINT_CHARS_MAX
    assert run.machine.roster.awaited == ("a",)
    ready = run.answer("a")
    assert kinds(ready)[:2] == ["Answered", "Committed"]


# ---------------------------------------------------------------- below quorum


def test_below_quorum_the_round_is_extended_with_workers_that_have_no_slot() -> None:
    run = RoundsDriver(workers_min=2, quorum=2, cohort_size_max=2)
    run.ready("a", "b", "c", "d")
    ready = run.tick(1000)
    assert ready.records == (Opened(1, 2, ("c", "d")),)
    assert assigned(ready) == {
        worker: Ticket(1, 1, slot) for slot, worker in enumerate(("a", "b", "c", "d"))
    }
    run.lost("a")
    run.lost("b")
    assert run.closes_at_ms == 2000
    run.answer("c")
    # A slot of the first cohort is still open.
    run.ready("a")
    ready = run.answer("a")
    commit = ready.records[1]
    assert isinstance(commit, Committed)
    assert [r.first_seed for r in commit.seed_ranges] == [
        first_seed_of(run.config.seed, 1, 0),
        first_seed_of(run.config.seed, 1, 2),
    ]


def test_when_all_have_said_their_word_the_extension_does_not_wait() -> None:
    run = RoundsDriver(workers_min=2, quorum=2)
    run.ready("a", "b")
    run.answer("a")
    run.ready("c")
    ready = run.unable("b")
    assert ready.records == (Opened(1, 2, ("c",)),)


def test_without_others_the_deadline_asks_everyone_again() -> None:
    run = RoundsDriver(workers_min=3, quorum=3)
    run.ready("a", "b", "c")
    run.answer("a")
    assert run.unable("b") == Ready()
    run.lost("c")
    assert run.tick(999) == Ready()
    ready = run.tick(1000)
    assert not ready.records
    assert assigned(ready) == {"b": Ticket(1, 1, 1)}
    assert run.closes_at_ms == 2000
    assert assigned(run.ready("c")) == {"c": Ticket(1, 1, 2)}


def test_a_round_never_has_more_slots_than_the_limit() -> None:
    state = RunState()
    state.apply(Genesis(config_of(), bytes(32), bytes(32), bytes(32), 1, 4))
    state.apply(Opened(1, 0, tuple(f"w{n}" for n in range(COHORT_MAX))))
    with pytest.raises(JournalCorruptError, match="at most 4096 slots"):
        state.apply(Opened(1, COHORT_MAX, ("more",)))


# ---------------------------------------------------------------- restarts


def test_a_restart_keeps_answers_and_fences_old_tickets() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    ready = run.restart(now_ms=50)
    assert ready == Ready(records=(Started(2),))
    assert run.machine.phase is Phase.OPEN
    assert run.machine.roster.awaited == ("b",)
    assert run.closes_at_ms == 1050
    assert run.ready("a") == Ready()
    assert assigned(run.ready("b")) == {"b": Ticket(2, 1, 1)}
    assert refusal(run.answer("b", epoch=1)) == "StaleTicketError"
    ready = run.answer("b")
    commit = ready.records[1]
    assert isinstance(commit, Committed)
    assert len(commit.seed_ranges) == 2


def test_the_deadline_passes_after_a_restart_with_nobody_there() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    run.restart()
    assert kinds(run.tick(1000)) == ["Committed"]
    assert run.machine.roster.awaited == ()
    assert run.machine.phase is Phase.WAITING


# ---------------------------------------------------------------- digests


def test_a_diverged_worker_is_named_expelled_and_not_committed() -> None:
    run = RoundsDriver(workers_min=3)
    run.ready("a", "b", "c")
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    ready = run.answer("c")
    assert ready.records[1] == Diverged(0, "b", WRONG_DIGEST64, TRUE_DIGEST64)
    assert kinds(ready)[:3] == ["Answered", "Diverged", "Committed"]
    [expel] = [m for m in ready.messages if isinstance(m, Expel)]
    assert expel.message == (
        "The weights of worker b after round 0 are not the run's: their digest begins "
        "ad0b000000000000, the run's ce110a0000000000; restart the worker so that it rebuilds them "
        "from the base and the journal."
    )
    assert len(ready.records[2].seed_ranges) == 2  # type: ignore[union-attr]
    assert run.machine.diverged == {"b"}
    assert refusal(run.answer("b", 1, round_=2)) == "UnknownWorkerError"


def test_a_rebuilt_worker_is_cleared_by_an_agreeing_answer() -> None:
    run = RoundsDriver(workers_min=2, rounds=9)
    run.ready("a", "b", "c")
    run.replica(0)
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    assert run.machine.diverged == {"b"}
    run.lost("b")
    run.ready("b")
    for _ in range(2):
        for worker in run.machine.roster.awaited:
            run.answer(worker)
    assert run.machine.diverged == frozenset()


def test_a_worker_found_diverged_at_the_end_is_cleared_by_a_report_that_others_confirm() -> None:
    run = RoundsDriver(workers_min=3, rounds=1)
    run.ready("a", "b", "c")
    for worker in "abc":
        run.answer(worker)
    assert run.machine.phase is Phase.FINISHED
    run.step(WeightsReported("a", 1, full(TRUE_DIGEST64)))
    run.step(WeightsReported("c", 1, full(TRUE_DIGEST64)))
    ready = run.step(WeightsReported("b", 1, full(WRONG_DIGEST64)))
    assert ready.records == (Diverged(1, "b", WRONG_DIGEST64, TRUE_DIGEST64),)
    assert run.machine.diverged == {"b"}
    run.step(WeightsReported("b", 1, full(WRONG_DIGEST64)))
    assert run.machine.diverged == {"b"}
    run.step(WeightsReported("b", 1, full(TRUE_DIGEST64)))
    assert run.machine.diverged == frozenset()


def test_a_diverged_worker_that_came_back_gets_a_fresh_slot_in_the_same_round() -> None:
    run = RoundsDriver(workers_min=3, quorum=3)
    run.ready("a", "b", "c")
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    ready = run.answer("c")
    assert expelled(ready) == ["b"]
    assert "Committed" not in kinds(ready)
    # The answer that was acknowledged stays acknowledged, but never counts.
    run.lost("b")
    ready = run.ready("b")
    assert ready.records == (Opened(1, 3, ("b",)),)
    assert kinds(run.answer("b", 1, digest=WRONG_DIGEST64)) == ["Ack"]
    ready = run.answer("b")
    commit = ready.records[1]
    assert isinstance(commit, Committed)
    assert [r.first_seed for r in commit.seed_ranges] == [
        first_seed_of(run.config.seed, 1, slot) for slot in (0, 2, 3)
    ]


@pytest.mark.parametrize("away", ["coordinator", "worker"])
def test_who_was_not_told_is_told_at_the_next_session(away: str) -> None:
    run = RoundsDriver(workers_min=3)
    run.ready("a", "b", "c")
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    if away == "worker":
        run.lost("b")
    ready = run.answer("c")
    assert expelled(ready) == ([] if away == "worker" else ["b"])
    if away == "coordinator":
        run.restart()
        run.ready("a", "c")
    assert expelled(run.ready("b")) == ["b"]
    run.lost("b")
    assert expelled(run.ready("b")) == []
    assert "b" in run.machine.roster.ready


def test_full_digests_that_differ_are_recorded_once_and_nobody_is_sent_away() -> None:
    run = RoundsDriver(rounds=1, workers_min=3)
    run.ready("a", "b", "c")
    for worker in ("a", "b", "c"):
        run.answer(worker)
    good, bad = full(TRUE_DIGEST64), full(WRONG_DIGEST64)
    for worker, digest in (("a", good), ("b", bad)):
        assert run.step(WeightsReported(worker, 1, digest)) == Ready()
    found = Diverged(1, "b", WRONG_DIGEST64, TRUE_DIGEST64)
    assert run.step(WeightsReported("c", 1, good)) == Ready((found,))
    assert run.step(WeightsReported("b", 1, bad)) == Ready()
    assert run.step(WeightsReported("b", 2, bad)) == Ready(), "no round of this journal"
    assert [report.party for report in run.machine.digests.newest()] == ["a", "b", "c"]
    run.restart()
    for worker, digest in (("a", good), ("c", good), ("b", bad)):
        assert run.step(WeightsReported(worker, 1, digest)) == Ready(), "the journal knows it"


def test_a_tie_waits_for_the_replica() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    assert kinds(run.answer("b", digest=WRONG_DIGEST64)) == ["Answered", "Ack"]
    assert run.tick(1000) == Ready()
    assert run.machine.round == 0
    ready = run.replica(0)
    assert ready.records[0] == Diverged(0, "b", WRONG_DIGEST64, TRUE_DIGEST64)
    assert kinds(ready)[1] == "Committed"


def test_a_tie_without_a_replica_asks_more_workers() -> None:
    run = RoundsDriver(workers_min=2, cohort_size_max=2)
    run.ready("a", "b")
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    ready = run.ready("c")
    assert ready.records == (Opened(1, 2, ("c",)),)
    ready = run.answer("c")
    assert expelled(ready) == ["b"]
    assert "Committed" in kinds(ready)


@pytest.mark.parametrize("replica_first", [True, False])
def test_three_parties_cannot_expel_two_that_have_the_replica_s_weights(
    replica_first: bool,
) -> None:
    run = RoundsDriver(workers_min=5, quorum=2, has_replica=True)
    run.ready("a", "b", "c", "honest-1", "honest-2")
    if replica_first:
        run.replica(0)
    for worker in ("a", "b", "c"):
        run.answer(worker, digest=WRONG_DIGEST64)
    run.answer("honest-1")
    ready = run.answer("honest-2")
    if not replica_first:
        assert kinds(ready) == ["Answered", "Ack"]
        assert "Committed" not in kinds(run.tick(1000))
        ready = run.replica(0)
    assert expelled(ready) == ["a", "b", "c"]
    assert "Committed" in kinds(ready)
    assert run.machine.diverged == {"a", "b", "c"}


def test_the_replica_decides_alone_and_a_restart_rebuilds_one_that_is_wrong() -> None:
    run = RoundsDriver(workers_min=2, rounds=9)
    run.ready("a", "b")
    run.replica(0, WRONG_DIGEST64)
    run.answer("a")
    assert expelled(run.answer("b")) == ["a", "b"]
    assert run.machine.round == 0
    run.restart()
    run.replica(0)
    run.ready("a", "b")  # They are told once more, as after any restart, and rebuild.
    run.ready("a", "b")
    run.tick(1000)
    run.answer("a", 2)
    run.answer("b", 3)
    assert run.machine.round == 1
    assert run.machine.diverged == frozenset()


def test_a_replica_that_reports_late_is_compared_with_what_was_agreed() -> None:
    run = RoundsDriver(rounds=30)
    run.ready("a")
    for _ in range(12):
        run.answer("a")
    assert len(run.machine.state.agreed) == DIGESTS_KEPT_MAX
    assert run.replica(2, WRONG_DIGEST64) == Ready(), "too long ago"
    assert run.replica(12, WRONG_DIGEST64) == Ready(), "nothing to compare with yet"
    assert run.replica(13, WRONG_DIGEST64) == Ready(), "of a round that is not committed"
    assert run.replica(10, WRONG_DIGEST64).records == (
        Diverged(10, "replica", WRONG_DIGEST64, TRUE_DIGEST64),
    )
    assert run.replica(10, WRONG_DIGEST64) == Ready(), "once"
    run.restart()
    assert run.replica(11, WRONG_DIGEST64) == Ready(), "known from the journal"


def test_no_worker_is_called_replica() -> None:
    run = RoundsDriver()
    assert expelled(run.ready("replica")) == ["replica"]
    assert run.machine.phase is Phase.WAITING


def test_nobody_is_judged_by_fewer_votes_than_the_quorum() -> None:
    run = RoundsDriver(workers_min=3, quorum=4)
    run.ready("a", "b", "c")
    run.answer("a")
    run.answer("b", digest=WRONG_DIGEST64)
    assert kinds(run.answer("c", digest=WRONG_DIGEST64)) == ["Answered", "Ack"]
    run.ready("d")
    run.ready("e")
    run.replica(0)
    assert kinds(run.answer("d")) == [
        "Answered",
        "Diverged",
        "Diverged",
        "Opened",
        "Ack",
        "Expel",
        "Expel",
        "Assign",
    ]


def test_a_replica_report_of_no_committed_round_is_no_vote() -> None:
    run = RoundsDriver()
    run.ready("a")
    run.replica(1, WRONG_DIGEST64)
    run.answer("a")
    assert "Committed" in kinds(run.answer("a"))


def test_answers_beyond_the_cohort_size_are_not_committed() -> None:
    run = RoundsDriver(workers_min=2, quorum=2, cohort_size_max=2)
    run.ready("a", "b")
    run.answer("a")
    run.answer("b", digest=3)
    for worker, digest in (("c", 4), ("d", TRUE_DIGEST64)):
        run.ready(worker)
        assert kinds(run.answer(worker, digest=digest)) == ["Answered", "Ack"]
    run.ready("e")
    ready = run.answer("e")
    assert kinds(ready)[:4] == ["Answered", "Diverged", "Diverged", "Committed"]
    commit = ready.records[3]
    assert isinstance(commit, Committed)
    assert [pairs.first_seed for pairs in commit.seed_ranges] == [
        first_seed_of(run.config.seed, 1, slot) for slot in (0, 3)
    ]


# ---------------------------------------------------------------- the journal


def test_a_machine_needs_its_genesis() -> None:
    machine = RoundMachine()
    with pytest.raises(JournalError, match="holds no run yet"):
        machine.start()
    with pytest.raises(JournalCorruptError, match="genesis"):
        machine.apply(Started(1))


ANSWER = Answered(1, 0, Scalars((1.0, 2.0), None, TRUE_DIGEST64))
COMMIT = Committed(1, (SeedRange(0, (1.0, 2.0)),), 0)


@pytest.mark.parametrize(
    ("before", "record"),
    [
        ([], Genesis(config_of(), bytes(32), bytes(32), bytes(32), 1, 4)),
        ([], Started(1)),
        ([], Started(3)),
        ([], Opened(2, 0, ("a",))),
        ([], Opened(1, 1, ("a",))),
        ([], Opened(1, 0, ())),
        ([], Opened(1, 0, ("a", "a"))),
        ([], ANSWER),
        ([], COMMIT),
        ([Opened(1, 0, ("a",))], Opened(1, 0, ("b",))),
        ([Opened(1, 0, ("a",))], Opened(1, 1, ("a",))),
        ([Opened(1, 0, ("a",))], Opened(2, 0, ("a",))),
        ([Opened(1, 0, ("a",))], Answered(1, 1, Scalars((1.0, 2.0), None, TRUE_DIGEST64))),
        ([Opened(1, 0, ("a",))], Answered(1, -1, Scalars((1.0, 2.0), None, TRUE_DIGEST64))),
        ([Opened(1, 0, ("a",))], Answered(2, 0, Scalars((1.0, 2.0), None, TRUE_DIGEST64))),
        ([Opened(1, 0, ("a",))], Answered(1, 0, Scalars((1.0, 2.0), None, None))),
        ([Opened(1, 0, ("a",))], COMMIT),
        ([Opened(1, 0, ("a",)), ANSWER], ANSWER),
        ([Opened(1, 0, ("a",)), ANSWER], Committed(2, COMMIT.seed_ranges, 0)),
        ([Opened(1, 0, ("a",)), ANSWER], Committed(1, (), 0)),
        ([Opened(1, 0, ("a",)), ANSWER, COMMIT], COMMIT),
    ],
)
def test_a_record_that_cannot_follow_is_a_corrupt_journal(
    before: list[Record], record: Record
) -> None:
    run = RoundsDriver()
    state = run.folded()
    for earlier in before:
        state.apply(earlier)
    with pytest.raises(JournalCorruptError, match=r"^The journal holds .*copy\.$"):
        state.apply(record)


def test_no_round_opens_after_the_last() -> None:
    run = RoundsDriver(rounds=1)
    run.ready("a")
    run.answer("a")
    with pytest.raises(JournalCorruptError, match="in a run of 1 rounds"):
        run.folded().apply(Opened(2, 0, ("a",)))


def test_what_the_driver_appends_itself_is_folded_too() -> None:
    run = RoundsDriver(workers_min=2)
    run.ready("a", "b")
    run.answer("a")
    evaluation = Evaluated(0, 0.7, 0.5, 10, bytes(32))
    for record in (evaluation, Diverged(0, "a", 5, 6), Diverged(0, "b", 5, 6)):
        run.machine.apply(record)
        run.records.append(record)
    assert list(run.machine.state.evaluations) == [evaluation]
    assert run.machine.diverged == {"a", "b"}
    # Another comparison's finding does not take back an answer whose own digest agreed.
    ready = run.answer("b")
    assert len(ready.records[1].seed_ranges) == 2  # type: ignore[union-attr]


def test_memory_stays_bounded() -> None:
    run = RoundsDriver(rounds=10_000, local_steps=1)
    machine = run.machine
    machine.step(WorkerReady("a"))
    for round_ in range(1, RECENT_ROUNDS_MAX + 50):
        machine.step(AnswerReceived("a", Ticket(1, round_, 0), Scalars((1.0,), None, 7)))
    state = machine.state
    assert machine.round == RECENT_ROUNDS_MAX + 49
    assert len(state.recent_rounds) == RECENT_ROUNDS_MAX
    assert len(state.agreed) == DIGESTS_KEPT_MAX
    assert [held.round for held in state.earlier] == [machine.round]


# ---------------------------------------------------------------- what the status shows


def test_a_complaint_is_over_once_the_worker_works_again() -> None:
    run = RoundsDriver(workers_min=2, quorum=1)
    run.ready("a", "b")
    run.unable("a", reason="the loss is nan")
    assert run.machine.roster.workers["a"].complaint == "the loss is nan"
    run.answer("b")
    assert run.machine.round == 1
    assert run.machine.roster.workers["a"].complaint == "the loss is nan"
    run.answer("a")
    assert run.machine.roster.workers["a"].complaint == ""


def test_nobody_measures_after_an_early_end() -> None:
    run = RoundsDriver(workers_min=2, early_stop_evaluations=1)
    run.ready("a", "b")
    for worker in "ab":
        run.answer(worker)
    assert len(run.machine.roster.awaited) == 2
    for round_, loss in enumerate((0.5, 0.6)):
        run.step(ReplicaEvaluated(Evaluated(round_, loss, 0.5, 10, bytes(32))))
    assert run.machine.phase is Phase.FINISHED
    assert not run.machine.roster.awaited
