"""Every (state, input) pair of the round machine, as one table; and any order of inputs at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.events import (
    Ack,
    AnswerReceived,
    Assign,
    Expel,
    Finish,
    Ready,
    Refuse,
    RoundEvent,
    Tick,
    Ticket,
    UnableReceived,
    WeightsReported,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Answered, Committed, Diverged, Opened, Scalars, first_seed_of
from tests.core.machines.rounds_driver import (
    TRUE_DIGEST64,
    WRONG_DIGEST64,
    RoundsDriver,
    full,
    kinds,
)

# ---------------------------------------------------------------- every pair
# All states: 2 rounds, quorum 2, workers a and b, each ticket of epoch 1.


def _waiting() -> RoundsDriver:
    run = RoundsDriver(rounds=2, workers_min=2, quorum=2)
    run.ready("a")
    return run


def _open() -> RoundsDriver:
    run = _waiting()
    run.ready("b")
    return run


def _answered() -> RoundsDriver:
    run = _open()
    run.answer("a")
    return run


def _given_up() -> RoundsDriver:
    run = _answered()
    run.unable("b")
    return run


def _undecided() -> RoundsDriver:
    run = _answered()
    run.answer("b", digest=WRONG_DIGEST64)
    return run


def _last_round() -> RoundsDriver:
    run = _answered()
    run.answer("b")
    run.answer("b")
    return run


def _finished() -> RoundsDriver:
    run = _last_round()
    run.answer("a")
    return run


STATES: dict[str, Callable[[], RoundsDriver]] = {
    "waiting": _waiting,
    "open": _open,
    "answered": _answered,
    "given up": _given_up,
    "undecided": _undecided,
    "last round": _last_round,
    "finished": _finished,
}
GRADS = (1.0, -2.0)
EVENTS: dict[str, RoundEvent] = {
    "a ready": WorkerReady("a"),
    "c ready": WorkerReady("c"),
    "replica joins": WorkerReady(REPLICA_PARTY),
    "a lost": WorkerLost("a"),
    "c lost": WorkerLost("c"),
    "a answers 1": AnswerReceived("a", Ticket(1, 1, 0), Scalars(GRADS, None, TRUE_DIGEST64)),
    "a differs 1": AnswerReceived("a", Ticket(1, 1, 0), Scalars((1.0, 2.0), None, TRUE_DIGEST64)),
    "a answers 2": AnswerReceived("a", Ticket(1, 2, 0), Scalars(GRADS, None, TRUE_DIGEST64)),
    "b answers 1": AnswerReceived("b", Ticket(1, 1, 1), Scalars(GRADS, None, TRUE_DIGEST64)),
    "b flipped 1": AnswerReceived("b", Ticket(1, 1, 1), Scalars(GRADS, None, WRONG_DIGEST64)),
    "c answers 1": AnswerReceived("c", Ticket(1, 1, 0), Scalars(GRADS, None, TRUE_DIGEST64)),
    "a malformed 1": AnswerReceived("a", Ticket(1, 1, 0), Scalars((), None, TRUE_DIGEST64)),
    "a unable 1": UnableReceived("a", Ticket(1, 1, 0), "loss is nan"),
    "a unable 2": UnableReceived("a", Ticket(1, 2, 0), "loss is nan"),
    "c unable 1": UnableReceived("c", Ticket(1, 1, 0), "loss is nan"),
    "replica 0": WeightsReported(REPLICA_PARTY, 0, full(TRUE_DIGEST64)),
    "replica 9": WeightsReported(REPLICA_PARTY, 9, full(WRONG_DIGEST64)),
    "early tick": Tick(999),
    "deadline": Tick(1000),
}
CODES = {
    "Opened": "O",
    "Answered": "A",
    "Committed": "C",
    "Diverged": "D",
    "Assign": "asg",
    "Ack": "ack",
    "Expel": "exp",
    "Finish": "fin",
    "StaleTicketError": "stale",
    "UnknownWorkerError": "unknown",
    "EquivocationError": "differs",
    "ScalarError": "scalar",
}
# What each input leads to in each state: records (capitals) to append, then messages to send.
TABLE = """
input         | waiting   | open    | answered          | given up          | undecided | last round      | finished
a ready       | -         | asg     | -                 | -                 | -         | asg             | fin
c ready       | O asg asg | -       | -                 | O asg             | O asg     | -               | fin
replica joins | exp       | exp     | exp               | exp               | exp       | exp             | exp
a lost        | -         | -       | -                 | -                 | -         | -               | -
c lost        | -         | -       | -                 | -                 | -         | -               | -
a answers 1   | stale     | A ack   | ack               | ack               | ack       | ack             | stale
a differs 1   | stale     | A ack   | differs           | differs           | differs   | differs         | stale
a answers 2   | stale     | stale   | stale             | stale             | stale     | A C ack fin fin | ack
b answers 1   | unknown   | A ack   | A C O ack asg asg | A C O ack asg asg | differs   | ack             | stale
b flipped 1   | unknown   | A ack   | A ack             | A ack             | ack       | differs         | stale
c answers 1   | unknown   | unknown | unknown           | unknown           | unknown   | unknown         | unknown
a malformed 1 | stale     | scalar  | scalar            | scalar            | scalar    | scalar          | stale
a unable 1    | stale     | -       | -                 | -                 | -         | stale           | stale
a unable 2    | stale     | stale   | stale             | stale             | stale     | -               | stale
c unable 1    | unknown   | unknown | unknown           | unknown           | unknown   | unknown         | unknown
replica 0     | -         | -       | -                 | -                 | D exp     | -               | -
replica 9     | -         | -       | -                 | -                 | -         | -               | -
early tick    | -         | -       | -                 | -                 | -         | -               | -
deadline      | -         | asg asg | asg               | asg               | -         | asg             | -
"""


def _code(ready: Ready) -> str:
    names = [
        item.reason if isinstance(item, Refuse) else name
        for name, item in zip(kinds(ready), (*ready.records, *ready.messages), strict=True)
    ]
    return " ".join(CODES[name] for name in names) or "-"


def _table() -> dict[tuple[str, str], str]:
    header, *rows = [
        [cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()
    ]
    assert header[1:] == list(STATES)
    return {
        (state, row[0]): cell
        for row in rows
        for state, cell in zip(header[1:], row[1:], strict=True)
    }


def test_the_table_has_every_pair() -> None:
    assert set(_table()) == {(state, event) for state in STATES for event in EVENTS}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_and_input(state: str, event: str) -> None:
    run = STATES[state]()
    ready = run.step(EVENTS[event])
    assert _code(ready) == _table()[state, event]


# ---------------------------------------------------------------- any order at all

WORKERS = ("a", "b", "c", "d")
names = st.sampled_from(WORKERS)
small = st.integers(-1, 1)
# Ticket fields are drawn as differences from the worker's own open ticket.
any_action = st.one_of(
    st.tuples(st.just("ready"), st.sampled_from((*WORKERS, REPLICA_PARTY))),
    st.tuples(st.just("lost"), names),
    st.tuples(
        st.just("answer"), names, st.sampled_from((0, 0, 0, -1, 1)), small, st.sampled_from((0, 1))
    ),
    st.tuples(st.just("answer"), names, st.just(0), st.just(0), st.sampled_from((0, 0, 1))),
    st.tuples(st.just("unable"), names),
    st.tuples(st.just("replica"), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("tick"), st.integers(-500, 1500)),
    st.tuples(st.just("restart")),
)
any_run = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 4),
        "workers_min": st.integers(1, 3),
        "quorum": st.integers(1, 3),
        "cohort_size_max": st.integers(3, 4),
        "digest_every_rounds": st.integers(1, 2),
    }
)


@settings(max_examples=150)
@given(any_run, st.lists(any_action, max_size=50))
def test_any_sequence_keeps_the_invariants(
    values: dict[str, int], actions: list[tuple[object, ...]]
) -> None:
    run = RoundsDriver(**values)
    now_ms = 0
    for action in actions:
        epoch_before = run.machine.epoch
        match action:
            case ("ready", str(worker)):
                ready = run.ready(worker)
            case ("lost", str(worker)):
                ready = run.lost(worker)
            case ("answer", str(worker), int(epoch), int(round_), int(flipped)):
                ready = run.answer(
                    worker,
                    digest=WRONG_DIGEST64 if flipped else TRUE_DIGEST64,
                    epoch=run.machine.epoch + epoch,
                    round_=run.machine.round + 1 + round_,
                )
            case ("unable", str(worker)):
                ready = run.unable(worker)
            case ("replica", int(round_), bool(honest)):
                ready = run.replica(round_, TRUE_DIGEST64 if honest else WRONG_DIGEST64)
            case ("tick", int(by_ms)):
                now_ms = max(now_ms, now_ms + by_ms)
                ready = run.tick(now_ms + min(by_ms, 0))
            case _:
                ready = run.restart(now_ms)
                assert run.machine.epoch == epoch_before + 1
        _check(run, ready, now_ms)


def _check(run: RoundsDriver, ready: Ready, now_ms: int) -> None:
    # `RoundsDriver` has compared the live state with the fold of all records already.
    machine, config = run.machine, run.config
    rounds = [record.round for record in run.records if isinstance(record, Committed)]
    assert rounds == list(range(1, machine.round + 1))
    answered = [(r.round, r.slot) for r in run.records if isinstance(r, Answered)]
    assert len(set(answered)) == len(answered)
    for record in ready.records:
        if isinstance(record, Committed):
            assert config.quorum <= len(record.seed_ranges) <= config.cohort_size_max
            seeds = [pair_run.first_seed for pair_run in record.seed_ranges]
            order = [first_seed_of(config.seed, record.round, slot) for slot in range(100)]
            assert seeds == sorted(set(seeds), key=order.index)
    for message in ready.messages:
        match message:
            case Assign(worker, ticket, work):
                current = machine.state.open
                assert current is not None
                assert worker in machine.roster.ready
                assert ticket == Ticket(machine.epoch, machine.round + 1, current.slots[worker])
                assert ticket.slot not in current.answers
                assert work.seeds[0] == first_seed_of(config.seed, ticket.round, ticket.slot)
            case Ack(_, ticket):
                assert (ticket.round, ticket.slot) in answered
            case Finish(worker, round_):
                assert worker in machine.roster.ready
                assert round_ == config.rounds == machine.round
            case Expel(worker):
                assert worker == REPLICA_PARTY or worker not in machine.roster.ready
            case Refuse():
                assert len(ready.messages) == 1
                assert not ready.records
    if machine.phase is Phase.OPEN:
        assert machine._closes_at_ms > now_ms, "a deadline that has passed was acted on"
    else:
        assert machine.state.open is None
        assert machine.roster.awaited == ()
    roster = machine.roster
    assert roster.idle == roster.ready - roster.assignments.keys()
    assert machine.cohort == (tuple(machine.state.open.cohort) if machine.state.open else ())


@settings(max_examples=30)
@given(any_run, st.randoms(use_true_random=False))
def test_a_run_of_honest_workers_always_finishes(values: dict[str, int], dice: object) -> None:
    run = RoundsDriver(**values)
    now_ms = 0
    for worker in WORKERS:
        run.ready(worker)
    while run.machine.phase is not Phase.FINISHED:
        awaited = run.machine.roster.awaited
        if awaited:
            run.answer(dice.choice(awaited))  # type: ignore[attr-defined]
        else:
            now_ms += run.config.deadline_ms
            run.tick(now_ms)
    opened = [record for record in run.records if isinstance(record, Opened)]
    assert {record.round for record in opened} == set(range(1, run.config.rounds + 1))
    assert not [record for record in run.records if isinstance(record, Diverged)]


def test_states_of_equal_journals_are_equal() -> None:
    run = _undecided()
    assert run.folded() == run.machine.state
    other = RunState()
    for record in run.records[:-1]:
        other.apply(record)
    assert other != run.machine.state
