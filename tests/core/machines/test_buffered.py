"""Buffered rounds: who gets work when, what a commit is made of, and what a restart makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.events import (
    Ack,
    AnswerReceived,
    Assign,
    Finish,
    Ready,
    Refuse,
    Ticket,
    UnableReceived,
)
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.machines.answers import is_digest_round
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Opened,
    RoundSlot,
    Scalars,
    SeedRange,
    Started,
)
from tests.core.machines.rounds_driver import (
    TRUE_DIGEST64,
    WRONG_DIGEST64,
    RoundsDriver,
    expelled,
    kinds,
    refusal,
)


class Buffered(RoundsDriver):
    """A buffered run whose workers answer the ticket that they were given last."""

    def __init__(self, **values: Any) -> None:
        self.tickets: dict[str, Ticket] = {}
        super().__init__(
            **({"rounds": 9, "buffer_answers": 2, "digest_every_rounds": 100} | values)
        )

    def keep(self, ready: Ready) -> Ready:
        """Also notes who was assigned what."""
        for message in ready.messages:
            if isinstance(message, Assign):
                self.tickets[message.worker] = message.ticket
        return super().keep(ready)

    def give(self, worker: str, ticket: Ticket | None = None, **values: Any) -> Ready:
        """An answer to the worker's newest ticket, or to `ticket`."""
        ticket = ticket or self.tickets[worker]
        wants_digest = is_digest_round(self.config, ticket.round)
        digest64 = values.pop("digest", TRUE_DIGEST64) if wants_digest else None
        grads = values.pop("grads", (1.0, -2.0))
        return self.step(AnswerReceived(worker, ticket, Scalars(grads, None, digest64)))

    @property
    def commits(self) -> list[Committed]:
        return [record for record in self.records if isinstance(record, Committed)]


def assigned(ready: Ready) -> list[tuple[str, int]]:
    """Who was given work of which round."""
    return [(m.worker, m.ticket.round) for m in ready.messages if isinstance(m, Assign)]


# ---------------------------------------------------------------- nobody waits


def test_a_worker_gets_new_work_with_its_acknowledgement() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    first = run.tickets["fast"]
    ready = run.give("fast")
    assert kinds(ready) == ["Answered", "Opened", "Ack", "Assign"]
    assert run.tickets["fast"].round == first.round == 1
    assert run.tickets["fast"].slot != first.slot, "another slot has other directions"


def test_a_round_commits_with_so_many_answers_whoever_is_slow() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    ready = run.give("fast")
    assert kinds(ready) == ["Answered", "Committed", "Opened", "Ack", "Assign"]
    assert assigned(ready) == [("fast", 2)]
    assert run.tickets["slow"].round == 1
    assert run.machine.roster.awaited == ("slow", "fast")


def test_a_late_answer_counts_with_its_age_and_discount() -> None:
    run = Buffered(workers_min=2, staleness_exponent=0.5)
    run.ready("fast", "slow")
    for _ in range(2 * 3):
        run.give("fast")
    ready = run.give("slow")
    assert kinds(ready) == ["Answered", "Opened", "Ack", "Assign"]
    assert assigned(ready) == [("slow", 4)], "new work is on the newest weights"
    run.give("fast")
    commit = run.commits[-1]
    late, fresh = commit.answers
    assert (commit.round, late.round, fresh.round) == (4, 1, 4)
    old, new = commit.seed_ranges
    # 1 + 3 rounds old: half as much as a fresh one; both over the two answers of the commit.
    assert old.coefficients == (-0.125, 0.25)
    assert new.coefficients == (-0.25, 0.5)


def test_without_an_exponent_an_old_answer_counts_as_a_fresh_one() -> None:
    run = Buffered(workers_min=2, staleness_exponent=0)
    run.ready("fast", "slow")
    for _ in range(2 * 3):
        run.give("fast")
    run.give("slow")
    run.give("fast")
    assert [pairs.coefficients for pairs in run.commits[-1].seed_ranges] == [(-0.25, 0.5)] * 2


def test_an_answer_that_is_too_old_is_refused_and_its_worker_has_new_work() -> None:
    run = Buffered(workers_min=2, staleness_max_rounds=1)
    run.ready("fast", "slow")
    old = run.tickets["slow"]
    run.give("fast")
    run.give("fast")
    assert run.tickets["slow"] == old
    run.give("fast")
    ready = run.give("fast")
    assert ("slow", 3) in assigned(ready)
    assert run.machine.roster.workers["slow"].complaint == (
        "did not answer round 1 before it was more than 1 rounds old"
    )
    ready = run.give("slow", old)
    assert refusal(ready) == "StaleTicketError"
    [refused] = ready.messages
    assert isinstance(refused, Refuse)
    assert "it is 2 rounds old, more than staleness_max_rounds = 1" in refused.message
    assert kinds(run.give("slow"))[0] == "Answered"


def test_a_round_commits_on_its_quorum_at_the_deadline() -> None:
    run = Buffered(buffer_answers=5, quorum=2, workers_min=3)
    run.ready("a", "b", "c")
    run.give("a")
    assert "Committed" not in kinds(run.tick(1000)), "one is fewer than the quorum"
    run.give("b")
    assert "Committed" not in kinds(run.tick(1999))
    assert "Committed" in kinds(run.tick(2000))
    assert len(run.commits[-1].answers) == 2


def test_no_more_workers_measure_at_a_time_than_may() -> None:
    run = Buffered(cohort_size_max=2, workers_min=3)
    run.ready("a", "b", "c")
    assert len(run.tickets) == 2
    [idle] = {"a", "b", "c"} - set(run.tickets)
    run.lost(run.machine.roster.awaited[0])
    assert idle in run.tickets, "who is gone makes room"


def test_a_worker_that_cannot_measure_stays_out_until_the_next_round() -> None:
    run = Buffered(workers_min=2)
    run.ready("good", "bad")
    assert kinds(run.step(UnableReceived("bad", run.tickets["bad"], "loss is nan"))) == []
    assert assigned(run.give("good")) == [("good", 1)]
    assert sorted(assigned(run.give("good"))) == [("bad", 2), ("good", 2)]


def test_a_worker_that_gives_earlier_work_back_gets_new_work_at_once() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.give("fast")
    ready = run.step(UnableReceived("slow", run.tickets["slow"], "newer weights"))
    assert assigned(ready) == [("slow", 2)]


def test_an_answer_alone_opens_the_round_that_it_counts_for() -> None:
    run = Buffered(buffer_answers=1, workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.lost("fast")
    run.give("slow")
    assert run.commits[-1].answers == (RoundSlot(1, 1),)
    assert run.machine.round == 2


def test_the_run_ends_and_what_comes_later_is_refused() -> None:
    run = Buffered(rounds=1, workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    ready = run.give("fast")
    assert {m.worker for m in ready.messages if isinstance(m, Finish)} == {"fast", "slow"}
    assert run.machine.phase is Phase.FINISHED
    assert refusal(run.give("slow")) == "StaleTicketError"


# ---------------------------------------------------------------- once


def test_a_repeated_answer_gets_its_acknowledgement_again_and_another_is_refused() -> None:
    run = Buffered(workers_min=2, staleness_max_rounds=2)
    run.ready("fast", "slow")
    ticket = run.tickets["slow"]
    run.give("slow")
    for _ in range(4):
        assert run.give("slow", ticket) == Ready((), (Ack("slow", ticket),))
        assert refusal(run.give("slow", ticket, grads=(1.0, 1.0))) == "EquivocationError"
        run.give("fast")
    held = [commit.answers for commit in run.commits]
    assert sum(places.count(RoundSlot(1, ticket.slot)) for places in held) == 1


@pytest.mark.parametrize(
    "answers",
    [
        (RoundSlot(1, 0), RoundSlot(1, 0)),
        (RoundSlot(1, 2), RoundSlot(1, 0)),
        (RoundSlot(1, 0), RoundSlot(1, 1)),
        (RoundSlot(1, 0),),
        (),
    ],
    ids=["twice", "out of order", "not answered", "fewer than its pairs", "none"],
)
def test_a_commit_that_holds_other_answers_cannot_be_folded(answers: tuple[RoundSlot, ...]) -> None:
    state = RunState()
    run = Buffered()
    opened = Opened(1, 0, ("a", "b", "c"))
    given = [Answered(1, slot, Scalars((1.0, 2.0), None, 1)) for slot in (0, 2)]
    for record in (run.records[0], Started(1), opened, *given):
        state.apply(record)
    pairs = SeedRange(0, (1.0, 2.0))
    with pytest.raises(JournalCorruptError, match="each of them once"):
        state.apply(Committed(1, (pairs, pairs), 0, answers=answers))
    state.apply(Committed(1, (pairs, pairs), 0, answers=(RoundSlot(1, 0), RoundSlot(1, 2))))


def test_a_commit_keeps_its_answers_on_the_wire_and_others_their_bytes() -> None:
    pairs = (SeedRange(1 << 16, (0.5,)),)
    commit = Committed(7, pairs, 3, answers=(RoundSlot(4, 300), RoundSlot(7, 0)))
    assert decode_record(encode_record(commit)) == commit
    plain = encode_record(Committed(7, pairs, 3))
    assert len(encode_record(commit)) > len(plain)
    assert decode_record(plain) == Committed(7, pairs, 3)
    with pytest.raises(JournalCorruptError, match="names 1 slots of rounds"):
        decode_record(encode_record(Committed(7, pairs, 3, answers=(RoundSlot(0, 0),))))


# ---------------------------------------------------------------- restarts


def test_workers_that_join_a_paused_run_get_their_work_when_it_is_resumed() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.keep(run.machine.pause("a look"))
    run.restart()
    assert assigned(run.ready("fast", "slow")) == []
    ready = run.keep(run.machine.resume(1.0))
    assert sorted(assigned(ready)) == [("fast", 1), ("slow", 1)]


def test_a_round_that_closes_when_the_run_is_resumed_is_assigned_to_nobody() -> None:
    """Workers get its commit first."""
    run = Buffered(workers_min=2, staleness_max_rounds=0)
    run.ready("fast", "other", "slow")
    run.keep(run.machine.pause("a look"))
    run.give("fast")
    run.give("other")
    ready = run.keep(run.machine.resume(1.0))
    assert run.machine.round == 1
    assert assigned(ready)
    assert all(round_ == 2 for _, round_ in assigned(ready))


def test_a_run_that_was_ended_takes_no_more_answers() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.keep(run.machine.stop("enough"))
    ready = run.give("fast")
    assert kinds(ready) == ["Refuse"]
    assert refusal(ready) == "StaleTicketError"
    assert "was ended before round 1 was committed" in str(ready.messages)


def test_a_restart_asks_again_for_what_was_assigned_in_earlier_rounds() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    old = run.tickets["slow"]
    run.give("fast")
    run.give("fast")
    run.restart()
    ready = run.ready("slow")
    assert run.tickets["slow"] == Ticket(2, old.round, old.slot)
    assert assigned(ready) == [("slow", 1)]
    assert refusal(run.give("slow", old)) == "StaleTicketError"
    assert kinds(run.give("slow"))[0] == "Answered"


def test_a_reconnected_worker_is_given_its_own_work_again() -> None:
    run = Buffered(workers_min=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.give("fast")
    run.lost("slow")
    assert assigned(run.ready("slow")) == [("slow", 1)]


# ---------------------------------------------------------------- whose weights


def test_a_late_digest_is_compared_with_what_was_agreed_of_its_round() -> None:
    run = Buffered(workers_min=3, digest_every_rounds=1, quorum=2)
    run.ready("a", "b", "flipped")
    late = RoundSlot(1, run.tickets["flipped"].slot)
    run.give("a")
    run.give("b")
    assert run.machine.round == 1
    assert run.machine.state.agreed == {0: TRUE_DIGEST64}
    run.give("flipped", digest=WRONG_DIGEST64)
    ready = run.give("a")
    assert ready.records[1] == Diverged(0, "flipped", WRONG_DIGEST64, TRUE_DIGEST64)
    assert expelled(ready) == ["flipped"]
    run.give("b")
    run.give("a")
    assert run.machine.round == 2
    assert late not in [place for commit in run.commits for place in commit.answers]


def test_one_worker_has_one_vote_however_many_answers() -> None:
    run = Buffered(workers_min=3, digest_every_rounds=1, quorum=2)
    run.ready("flipped", "b", "c")
    run.give("flipped", digest=WRONG_DIGEST64)
    ready = run.give("flipped", digest=WRONG_DIGEST64)
    assert kinds(ready) == ["Answered", "Ack"], "more answers of one worker decide nothing"
    run.give("b")
    assert run.machine.round == 0, "one against one"
    ready = run.give("c")
    assert expelled(ready) == ["flipped"]
    assert run.machine.round == 1
    assert len(run.commits[0].answers) == 2


def test_the_replica_decides_where_few_have_answered() -> None:
    run = Buffered(workers_min=2, digest_every_rounds=1, quorum=2)
    run.ready("fast", "slow")
    run.give("fast")
    run.give("fast")
    assert run.machine.round == 0
    ready = run.replica(0)
    assert kinds(ready)[0] == "Committed"
    assert sorted(assigned(ready)) == [("fast", 2)]


def test_what_was_agreed_is_remembered_for_the_oldest_answer_and_no_longer() -> None:
    run = Buffered(digest_every_rounds=1, staleness_max_rounds=20, rounds=100, buffer_answers=1)
    run.ready("fast", "slow")
    for _ in range(50):
        run.give("fast")
    agreed = run.machine.state.agreed
    assert min(agreed) <= run.machine.round - 20
    assert len(agreed) < 30
    assert len(run.machine.state.earlier) == 21


# ---------------------------------------------------------------- any order at all

WORKERS = ("a", "b", "c", "d")
moves = st.lists(
    st.tuples(
        st.sampled_from(["give", "give", "give", "again", "lost", "ready", "unable", "tick"]),
        st.sampled_from(WORKERS),
        st.integers(0, 3),
    )
    | st.tuples(st.just("restart"), st.just(""), st.just(0)),
    max_size=60,
)


@settings(max_examples=150)
@given(
    moves,
    st.integers(1, 4),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["per_worker", "pool"]),
    st.sampled_from(["frozen", "update_distance"]),
)
def test_any_order_of_arrivals_is_folded_alike_and_counts_every_answer_once(
    played: list[tuple[str, str, int]], most: int, oldest: int, seed_policy: str, rate: str
) -> None:
    """`RoundsDriver.keep` compares the live state with a fresh fold after each step."""
    run = Buffered(
        buffer_answers=most,
        staleness_max_rounds=oldest,
        seed_policy=seed_policy,
        personal_rate=rate,
        digest_every_rounds=2,
        rounds=6,
    )
    run.ready(*WORKERS[:2])
    given_tickets: dict[str, list[Ticket]] = {worker: [] for worker in WORKERS}
    now_ms = 0
    for move, worker, number in played:
        match move:
            case "give" if worker in run.tickets:
                given_tickets[worker].append(run.tickets[worker])
                run.give(worker, grads=(float(number), -2.0))
            case "again" if given_tickets[worker]:
                run.give(worker, given_tickets[worker][number % len(given_tickets[worker])])
            case "unable" if worker in run.tickets:
                run.step(UnableReceived(worker, run.tickets[worker], "no"))
            case "lost":
                run.lost(worker)
            case "ready":
                run.ready(worker)
            case "tick":
                now_ms += 300 * number
                run.tick(now_ms)
            case "restart":
                run.restart(now_ms)
            case _:
                pass
    _check_journal(run, most, oldest)


def _check_journal(run: Buffered, most: int, oldest: int) -> None:
    """What a reader of the journal alone can say."""
    answered: dict[RoundSlot, int] = {}
    committed: list[RoundSlot] = []
    round_ = 0
    for record in run.records:
        if isinstance(record, Answered):
            place = RoundSlot(record.round, record.slot)
            assert place not in answered, "a second answer to one ticket"
            assert 0 <= round_ + 1 - record.round <= oldest
            answered[place] = round_
        elif isinstance(record, Committed):
            round_ += 1
            assert record.round == round_
            assert 1 <= len(record.answers) <= most
            assert all(0 <= round_ - place.round <= oldest for place in record.answers)
            assert set(record.answers) <= answered.keys()
            committed += record.answers
    assert len(committed) == len(set(committed)), "an answer was counted twice"
