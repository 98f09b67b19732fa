"""The relay's machine, one decision at a time."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from fedmezo_core.config import COMMIT_PAIRS_MAX, RunConfig, TaskConfig
from fedmezo_core.errors import DivergedError, ProtocolError
from fedmezo_core.events import (
    Ack,
    Acknowledged,
    AnswerReceived,
    Assign,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    Expel,
    Finish,
    FinishedByCoordinator,
    Leave,
    Refuse,
    RefusedByCoordinator,
    ReportDigest,
    SendAnswer,
    SendHello,
    SendUnable,
    SentAway,
    Tick,
    Ticket,
    UnableReceived,
    Vouched,
    WeightsReported,
    Welcomed,
    Work,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import head_after
from fedmezo_core.machines.aggregate import site_mean, to_binary32
from fedmezo_core.machines.relay import (
    REJOIN_MS,
    REPORT_MS,
    RelayMachine,
    RelayReady,
    site_workers_max,
)
from fedmezo_core.machines.roster import Phase
from fedmezo_core.records import Committed, Genesis, Scalars, SeedRange

HEAD = b"h" * 32
SEEDS = (7, 8)


def config_of(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_id": "r",
        "model": "m",
        "task": TaskConfig(verbalizers={"a": "a", "b": "b"}),
        "local_steps": 2,
        "rounds": 9,
        "digest_every_rounds": 2,
        "learning_rate": 1e-3,
        "deadline_ms": 10_000,
    }
    return RunConfig(**(values | changes))


def work_of(config: RunConfig, *, want_digest: bool = False) -> Work:
    return Work(SEEDS, config.learning_rate, config.eps, want_digest)


class Site:
    """A relay's machine with a coordinator above, both by hand. Round 2 is no digest round."""

    def __init__(self, workers: int = 2, round_: int = 1, **changes: Any) -> None:
        more = {k: changes.pop(k) for k in ("workers_min", "deadline_share") if k in changes}
        self.config = config_of(**changes)
        genesis = Genesis(self.config, bytes(32), bytes(32), bytes(32), 1, 4)
        self.machine = RelayMachine(genesis, round_, HEAD, **more)
        self.head = HEAD
        self.step(Vouched(1, round_, HEAD))
        for number in range(workers):
            self.step(WorkerReady(f"w{number}"))
        self.connect(1)

    def step(self, event: Any) -> RelayReady:
        return self.machine.step(event)

    def connect(self, epoch: int, behind: int = 0) -> RelayReady:
        self.step(Connected())
        head = self.head if not behind else b""
        return self.step(Welcomed(epoch, self.machine.received_round + behind, head))

    def assign(self, round_: int = 2, *, epoch: int = 1, slot: int = 3, **work: Any) -> RelayReady:
        ticket = Ticket(epoch, round_, slot)
        return self.step(Assigned(ticket, work_of(self.config, **work), deadline_ms=10_000))

    def answer(self, worker: str, *grads: float, round_: int = 2, **more: Any) -> RelayReady:
        values: dict[str, Any] = {"mean_loss": None, "weights_digest64": None}
        ticket = more.pop("ticket", Ticket(1, round_, 3))
        return self.step(AnswerReceived(worker, ticket, Scalars(grads, **(values | more))))

    def commit(self, round_: int) -> RelayReady:
        record = Committed(round_, (SeedRange(1, (0.5, 0.5)),), 0)
        body = encode_record(record)
        self.head = head_after(self.head, body)
        return self.step(CommitReceived(record, body))


def rounds_of(ready: RelayReady) -> list[int]:
    return [record.round for record in ready.records]


def answered(*grads: float, rows: int | None = None, loss: float | None = None) -> Scalars:
    return Scalars(grads, loss, None, rows)


# ---------------------------------------------------------------- the mean


def test_a_mean_is_weighted_by_rows_and_rounded_to_binary32() -> None:
    mean = site_mean([answered(1.0, -2.0, rows=1, loss=1.0), answered(4.0, 1.0, rows=2)])
    assert mean == Scalars((3.0, 0.0), 1.0, None, 3)
    assert site_mean([answered(0.1), answered(0.2), answered(0.4)]).projected_grads == (
        to_binary32((0.1 + 0.2 + 0.4) / 3),
    )


def test_the_order_of_answers_does_not_change_a_bit() -> None:
    rng = random.Random(1)
    answers = [
        answered(*(to_binary32(rng.gauss(0, 10 ** rng.randint(-9, 9))) for _ in range(8)), rows=n)
        for n in range(1, 200)
    ]
    first = site_mean(answers)
    for _ in range(5):
        rng.shuffle(answers)
        assert site_mean(answers) == first


def test_one_answer_alone_is_passed_on_as_it_is() -> None:
    rng = random.Random(2)
    for _ in range(500):
        grad = to_binary32(rng.gauss(0, 10 ** rng.randint(-30, 30)))
        assert site_mean([answered(grad, rows=rng.randint(1, 2**40))]).projected_grads == (grad,)


def test_a_mean_never_leaves_the_clip() -> None:
    clip = to_binary32(0.1)
    for count in range(1, 50):
        [mean] = site_mean([answered(clip, rows=2**40 - n) for n in range(count)]).projected_grads
        assert math.isclose(mean, clip, rel_tol=0, abs_tol=0)


# ---------------------------------------------------------------- down, up and back


def test_all_workers_get_the_ticket_that_the_site_got_and_their_mean_goes_up() -> None:
    site = Site()
    ready = site.assign()
    assert [m.worker for m in ready.messages] == ["w0", "w1"]
    for message in ready.messages:
        assert isinstance(message, Assign)
        assert message.ticket == Ticket(1, 2, 3)
        assert message.work.seeds == SEEDS
        assert message.deadline_ms == 8000
    assert site.answer("w0", 1.0, 2.0) == RelayReady()
    ready = site.answer("w1", 3.0, 6.0)
    assert ready.messages == ()
    [up] = ready.up
    assert isinstance(up, SendAnswer)
    assert up.ticket == Ticket(1, 2, 3)
    assert up.scalars.projected_grads == (2.0, 4.0)
    assert up.head64 is not None


def test_nothing_is_acknowledged_before_the_coordinator_above_has_done_so() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 2.0)
    assert site.answer("w1", 3.0, 6.0).messages == ()
    ready = site.step(Acknowledged(Ticket(1, 2, 3)))
    ticket = Ticket(1, 2, 3)
    assert ready.messages == (Ack("w0", ticket), Ack("w1", ticket))
    assert site.step(Acknowledged(Ticket(1, 2, 3))).messages == ()
    assert site.answer("w0", 1.0, 2.0).messages == (Ack("w0", ticket),)


def test_rows_and_losses_go_up_as_the_contract_says() -> None:
    site = Site(weighting="rows", report_losses=True)
    site.assign()
    site.answer("w0", 1.0, 1.0, rows=3, mean_loss=1.0)
    [up] = site.answer("w1", 5.0, 1.0, rows=1, mean_loss=3.0).up
    assert isinstance(up, SendAnswer)
    assert (up.scalars.projected_grads, up.scalars.mean_loss, up.scalars.rows) == (
        (2.0, 1.0),
        1.5,
        4,
    )


def test_one_huge_answer_is_scaled_down_before_the_mean() -> None:
    site = Site(workers=3, clip_median_factor=10.0, weighting="rows")
    site.assign()
    site.answer("w0", 3.0, -4.0, rows=1)
    site.answer("w1", 3.0, -4.0, rows=1)
    ready = site.answer("w2", 3000.0, -4000.0, rows=8)
    [up] = ready.up
    assert isinstance(up, SendAnswer)
    # The usual size is one worker's, however many rows another claims: 30 times it is taken.
    assert up.scalars.projected_grads == pytest.approx((242 * 3 / 10, -242 * 4 / 10))
    assert "w2 from 3536 to 106.1" in ready.warnings[0]
    assert "far larger than usual" in site.machine.roster.workers["w2"].complaint


def test_rows_of_a_huge_site_stay_within_what_one_worker_may_claim() -> None:
    site = Site(weighting="rows")
    site.assign()
    site.answer("w0", 1.0, 1.0, rows=2**40)
    [up] = site.answer("w1", 1.0, 1.0, rows=2**40).up
    assert isinstance(up, SendAnswer)
    assert up.scalars.rows == 2**40


@pytest.mark.parametrize(
    ("grads", "more", "reason"),
    [
        ((1.0,), {}, "ScalarError"),
        ((math.nan, 1.0), {}, "ScalarError"),
        ((1e9, 1.0), {}, "ScalarError"),
        ((1.0, 1.0), {"mean_loss": 1.0}, "ProtocolError"),
        ((1.0, 1.0), {"rows": 5}, "ProtocolError"),
        ((1.0, 1.0), {"ticket": Ticket(1, 2, 4)}, "StaleTicketError"),
        ((1.0, 1.0), {"ticket": Ticket(2, 2, 3)}, "StaleTicketError"),
        ((1.0, 1.0), {"ticket": Ticket(1, 3, 3)}, "StaleTicketError"),
    ],
)
def test_what_the_contract_does_not_allow_is_refused_at_the_site(
    grads: tuple[float, ...], more: dict[str, Any], reason: str
) -> None:
    site = Site()
    site.assign()
    [refused] = site.answer("w0", *grads, **more).messages
    assert isinstance(refused, Refuse)
    assert refused.reason == reason
    site.answer("w0", 1.0, 1.0)
    assert site.answer("w1", 1.0, 1.0).up


def test_a_second_different_answer_is_refused_and_the_first_stands() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 1.0)
    [refused] = site.answer("w0", 2.0, 1.0).messages
    assert isinstance(refused, Refuse)
    assert refused.reason == "EquivocationError"
    [up] = site.answer("w1", 3.0, 1.0).up
    assert isinstance(up, SendAnswer)
    assert up.scalars.projected_grads == (2.0, 1.0)


def test_a_stranger_is_told_to_join() -> None:
    site = Site()
    site.assign()
    [refused] = site.answer("w9", 1.0, 1.0).messages
    assert isinstance(refused, Refuse)
    assert refused.reason == "UnknownWorkerError"


def test_a_refusal_from_above_is_passed_on() -> None:
    site = Site(workers=1)
    site.assign()
    site.answer("w0", 1.0, 1.0)
    [refused] = site.step(RefusedByCoordinator(Ticket(1, 2, 3), "ScalarError", "no.")).messages
    assert isinstance(refused, Refuse)
    assert (refused.worker, refused.reason) == ("w0", "ScalarError")
    assert refused.message == "The site's answer was refused above: no."


def test_commits_go_down_in_order_and_before_new_work() -> None:
    site = Site(workers=1)
    site.assign()
    site.answer("w0", 1.0, 1.0)
    assert rounds_of(site.commit(2)) == [2]
    assert site.machine.may_welcome
    ready = site.assign(3, want_digest=True)
    assert [type(message) for message in ready.messages] == [Assign]


# ---------------------------------------------------------------- stragglers


def test_stragglers_cost_the_site_only_their_share() -> None:
    site = Site(workers=3)
    site.assign()
    site.answer("w0", 1.0, 1.0)
    assert site.step(Tick(7999)).up == ()
    [up] = site.step(Tick(8000)).up
    assert isinstance(up, SendAnswer)
    assert up.scalars.projected_grads == (1.0, 1.0)
    assert "did not answer round 2" in site.machine.roster.workers["w1"].complaint
    [refused] = site.answer("w1", 1.0, 1.0).messages
    assert isinstance(refused, Refuse)
    assert refused.reason == "StaleTicketError"
    assert [m.worker for m in site.step(Acknowledged(Ticket(1, 2, 3))).messages] == ["w0"]


def test_a_worker_that_stays_silent_costs_its_site_one_share_of_the_deadline() -> None:
    site = Site(workers=2, digest_every_rounds=9)
    site.assign()
    site.answer("w0", 1.0, 1.0)
    assert site.step(Tick(8000)).up
    site.commit(2)
    for round_ in (3, 4):
        site.assign(round_)
        [up] = site.answer("w0", 1.0, 1.0, round_=round_).up
        assert isinstance(up, SendAnswer)
        assert not site.answer("w1", 1.0, 1.0, round_=round_).up
        site.commit(round_)
    assert site.machine.roster.workers["w1"].misses == 1
    # It is waited for again once it answers in time.
    site.assign(5)
    site.answer("w1", 1.0, 1.0, round_=5)
    site.answer("w0", 1.0, 1.0, round_=5)
    site.commit(5)
    site.assign(6)
    assert not site.answer("w0", 1.0, 1.0, round_=6).up
    assert site.answer("w1", 1.0, 1.0, round_=6).up


def test_without_any_answer_in_time_the_first_late_one_goes_up_alone() -> None:
    site = Site()
    site.assign()
    assert site.step(Tick(9000)).up == ()
    [up] = site.answer("w1", 1.0, 1.0).up
    assert isinstance(up, SendAnswer)


def test_work_that_is_assigned_again_has_a_new_deadline_and_asks_the_unable_again() -> None:
    site = Site()
    site.assign()
    site.step(UnableReceived("w1", Ticket(1, 2, 3), "nan"))
    site.step(Tick(9000))
    [asked] = site.assign().messages
    assert isinstance(asked, Assign)
    assert (asked.worker, asked.deadline_ms) == ("w1", 8000)
    assert site.answer("w0", 1.0, 1.0).up == ()
    assert len(site.step(Tick(17_000)).up) == 1


def test_if_nobody_can_measure_it_is_said_at_once() -> None:
    site = Site()
    site.assign()
    assert site.step(UnableReceived("w0", Ticket(1, 2, 3), "nan")).up == ()
    [up] = site.step(UnableReceived("w1", Ticket(1, 2, 3), "nan")).up
    assert isinstance(up, SendUnable)


def test_a_worker_that_was_just_lost_is_waited_for_and_asked_again() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 1.0)
    assert site.step(WorkerLost("w1")).up == ()
    [asked] = site.step(WorkerReady("w1")).messages
    assert isinstance(asked, Assign)
    site.step(WorkerLost("w1"))
    site.step(Tick(7000))
    assert site.machine.phase is Phase.OPEN


def test_a_worker_that_stays_away_is_waited_for_no_longer_than_it_takes_to_come_back() -> None:
    site = Site(deadline_share=1.0)
    site.step(WorkerLost("w1"))
    site.step(Tick(REJOIN_MS - 100))
    site.assign()
    assert site.answer("w0", 1.0, 1.0).up == ()
    assert len(site.step(Tick(REJOIN_MS)).up) == 1


def test_a_worker_that_joins_in_mid_round_is_asked_too() -> None:
    site = Site(workers=1)
    site.assign()
    [asked] = site.step(WorkerReady("w9")).messages
    assert isinstance(asked, Assign)
    assert site.answer("w0", 1.0, 1.0).up == ()
    assert len(site.answer("w9", 1.0, 1.0).up) == 1


def test_a_round_that_is_committed_without_the_site_is_given_up() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 1.0)
    ready = site.commit(2)
    assert rounds_of(ready) == [2]
    assert ready.up == ()
    [refused] = ready.messages
    assert isinstance(refused, Refuse)
    assert (refused.worker, refused.reason) == ("w0", "StaleTicketError")


def test_in_a_buffered_run_commits_wait_until_the_site_has_answered() -> None:
    site = Site(buffer_answers=2)
    site.assign()
    site.answer("w0", 1.0, 1.0)
    assert site.commit(2).records == ()
    assert (site.machine.round, site.machine.received_round) == (1, 2)
    ready = site.answer("w1", 1.0, 1.0)
    assert isinstance(ready.up[0], SendAnswer)
    assert rounds_of(ready) == [2]


def test_in_a_buffered_run_what_was_missed_waits_and_is_vouched_for_meanwhile() -> None:
    site = Site(buffer_answers=2)
    site.assign()
    site.step(Disconnected())
    site.commit(2)
    site.step(Vouched(1, 2, site.head))
    site.answer("w0", 1.0, 1.0)
    ready = site.answer("w1", 1.0, 1.0)
    assert (rounds_of(ready), ready.dismissed) == ([2], "")
    assert site.machine.may_welcome


@pytest.mark.parametrize(("steps", "most"), [(1, 4096), (64, 4096), (4096, 64)])
def test_a_site_asks_no_more_workers_than_one_round_may_have(steps: int, most: int) -> None:
    config = config_of(local_steps=steps, cohort_size_max=1)
    assert site_workers_max(config) == most
    assert most * steps <= max(COMMIT_PAIRS_MAX, 4096)


@pytest.mark.parametrize(("workers", "asked"), [(2, 2), (3, 3), (4, 3)])
def test_one_less_just_so_many_and_one_more_than_a_site_may_ask(
    monkeypatch: pytest.MonkeyPatch, workers: int, asked: int
) -> None:
    monkeypatch.setattr("fedmezo_core.machines.relay.COHORT_MAX", 3)
    site = Site(workers=workers)
    assert len(site.assign().messages) == asked
    late = site.step(WorkerReady("late")).messages
    assert len(late) == (1 if workers < 3 else 0)


# ---------------------------------------------------------------- weights


def test_the_digest_of_most_workers_goes_up_and_others_are_sent_away() -> None:
    site = Site(workers=3, round_=2)
    site.assign(3, want_digest=True)
    site.answer("w0", 1.0, 1.0, round_=3, weights_digest64=5)
    site.answer("w1", 9.0, 9.0, round_=3, weights_digest64=6)
    ready = site.answer("w2", 3.0, 3.0, round_=3, weights_digest64=5)
    [up] = ready.up
    assert isinstance(up, SendAnswer)
    assert (up.scalars.projected_grads, up.scalars.weights_digest64) == ((2.0, 2.0), 5)
    [expelled] = ready.messages
    assert isinstance(expelled, Expel)
    assert expelled.worker == "w1"
    assert site.machine.diverged == {"w1"}
    assert [m.worker for m in site.step(Acknowledged(Ticket(1, 3, 3))).messages] == ["w0", "w2"]


def test_without_a_majority_nobody_can_tell_and_all_rebuild() -> None:
    site = Site(round_=2)
    site.assign(3, want_digest=True)
    site.answer("w0", 1.0, 1.0, round_=3, weights_digest64=5)
    ready = site.answer("w1", 1.0, 1.0, round_=3, weights_digest64=6)
    assert [(type(m), m.worker) for m in ready.messages] == [(Expel, "w0"), (Expel, "w1")]
    [up] = ready.up
    assert up == SendUnable(Ticket(1, 3, 3), "the weights of this site's workers differ")


def test_a_site_that_is_sent_away_rebuilds_and_measures_anew() -> None:
    site = Site(round_=2)
    site.assign(3, want_digest=True)
    site.answer("w0", 1.0, 1.0, round_=3, weights_digest64=5)
    site.answer("w1", 1.0, 1.0, round_=3, weights_digest64=5)
    ready = site.step(SentAway("weights differ."))
    assert [(type(m), m.worker) for m in ready.messages] == [(Expel, "w0"), (Expel, "w1")]
    for worker in ("w0", "w1"):
        site.step(WorkerReady(worker))
    site.connect(1)
    ready = site.assign(3, want_digest=True)
    assert [type(m) for m in ready.messages] == [Assign, Assign]
    assert ready.up == ()


# ---------------------------------------------------------------- streams that break, starts


def test_an_answer_whose_stream_broke_is_repeated_bit_for_bit() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 2.0)
    [first] = site.answer("w1", 3.0, 6.0).up
    site.step(Disconnected())
    site.connect(1)
    ready = site.assign()
    assert ready.up == (first,)
    assert ready.messages == ()


def test_in_a_new_epoch_workers_join_again_and_answer_under_the_new_ticket() -> None:
    site = Site()
    site.assign()
    site.answer("w0", 1.0, 1.0)
    site.step(Disconnected())
    ready = site.connect(2)
    assert "started anew" in ready.dismissed
    assert site.assign(epoch=2).messages == ()
    [asked] = site.step(WorkerReady("w1")).messages
    assert isinstance(asked, Assign)
    assert asked.ticket == Ticket(2, 2, 3)
    site.step(WorkerReady("w0"))
    ready = site.answer("w1", 3.0, 3.0, ticket=Ticket(2, 2, 3))
    [up] = ready.up
    assert isinstance(up, SendAnswer)
    assert (up.ticket, up.scalars.projected_grads) == (Ticket(2, 2, 3), (2.0, 2.0))


def test_other_work_in_a_new_epoch_takes_the_place_of_what_was_measured() -> None:
    site = Site(workers=1)
    site.assign()
    site.step(Disconnected())
    site.connect(2)
    site.step(WorkerReady("w0"))
    ready = site.assign(epoch=2, slot=5)
    [asked] = [m for m in ready.messages if isinstance(m, Assign)]
    assert asked.ticket == Ticket(2, 2, 5)


def test_rounds_that_were_missed_are_not_signed_so_workers_join_again() -> None:
    site = Site()
    site.step(Disconnected())
    site.connect(1, behind=2)
    ready = site.commit(2)
    assert "catches up" in ready.dismissed
    assert not site.machine.may_welcome
    site.commit(3)
    assert site.machine.may_welcome


def test_one_missed_round_has_the_welcomes_signature_and_nobody_leaves() -> None:
    site = Site()
    site.step(Disconnected())
    site.connect(1, behind=1)
    ready = site.commit(2)
    assert ready.dismissed == ""
    assert rounds_of(ready) == [2]
    assert site.machine.may_welcome


def test_nobody_is_welcomed_at_a_round_that_nobody_vouches_for() -> None:
    machine = RelayMachine(Genesis(config_of(), bytes(32), bytes(32), bytes(32), 1, 4), 0, HEAD)
    assert not machine.may_welcome
    machine.step(Vouched(4, 7, b"x" * 32))
    assert not machine.may_welcome
    machine.step(Vouched(4, 0, HEAD))
    assert machine.may_welcome
    assert machine.epoch == 4
    with pytest.raises(DivergedError, match="another history"):
        machine.step(Vouched(4, 0, b"x" * 32))


def test_a_site_takes_part_from_its_least_count_on_until_the_last_is_gone() -> None:
    site = Site(workers=2, workers_min=3)
    assert not site.machine.is_staffed
    assert site.machine.reason == "2 of 3 workers are here"
    site.step(WorkerReady("w9"))
    assert site.machine.is_staffed
    for worker in ("w0", "w1", "w9"):
        site.step(WorkerLost(worker))
    assert site.machine.is_staffed
    site.step(Tick(REJOIN_MS))
    assert not site.machine.is_staffed


def test_of_a_run_that_is_over_one_worker_is_enough_to_be_told_so() -> None:
    site = Site(workers=1, workers_min=3)
    assert not site.machine.is_staffed
    site.step(Disconnected())
    site.step(Vouched(1, 1, HEAD, finished=True))
    assert site.machine.is_staffed
    assert site.machine.phase is Phase.FINISHED


def test_a_message_that_is_not_allowed_changes_nothing() -> None:
    site = Site()
    with pytest.raises(ProtocolError):
        site.step(Welcomed(1, 1))
    with pytest.raises(ProtocolError):
        site.commit(7)
    assert site.assign().messages


def test_the_hello_names_what_the_relay_holds() -> None:
    site = Site()
    site.step(Disconnected())
    assert site.step(Connected()).up == (SendHello(1, HEAD),)


# ---------------------------------------------------------------- the end


def finished() -> Site:
    site = Site(round_=2)
    ready = site.step(FinishedByCoordinator(2))
    assert ready.messages == (Finish("w0", 2), Finish("w1", 2))
    assert ready.up == ()
    return site


def test_at_the_end_the_weights_of_most_workers_are_reported() -> None:
    site = finished()
    assert site.step(WeightsReported("w0", 2, b"d" * 32)).up == ()
    ready = site.step(WeightsReported("w1", 2, b"d" * 32))
    assert ready.up == (ReportDigest(2, b"d" * 32), Leave())
    assert site.machine.left
    assert site.step(WorkerReady("w7")).messages == (Finish("w7", 2),)


def test_if_the_last_weights_differ_none_are_reported() -> None:
    site = finished()
    site.step(WeightsReported("w0", 2, b"d" * 32))
    assert site.step(WeightsReported("w1", 2, b"e" * 32)).up == (Leave(),)


def test_a_worker_whose_last_weights_differ_is_named_for_the_log() -> None:
    site = Site(workers=3, round_=2)
    site.step(FinishedByCoordinator(2))
    for worker, digest in (("w0", b"d"), ("w1", b"e")):
        assert site.step(WeightsReported(worker, 2, digest * 32)).diverged == ()
    ready = site.step(WeightsReported("w2", 2, b"d" * 32))
    assert [(found.party, found.round) for found in ready.diverged] == [("w1", 2)]
    assert ready.up == (ReportDigest(2, b"d" * 32), Leave())


def test_a_worker_that_never_reports_holds_the_end_up_for_a_minute_only() -> None:
    site = finished()
    site.step(WeightsReported("w0", 2, b"d" * 32))
    assert site.step(Tick(REPORT_MS - 1)).up == ()
    assert site.step(Tick(REPORT_MS)).up == (ReportDigest(2, b"d" * 32), Leave())


def test_a_stream_that_breaks_at_the_end_is_not_opened_again() -> None:
    site = finished()
    site.step(Disconnected())
    assert site.machine.left
