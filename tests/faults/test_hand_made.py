"""Hand-made journals and sealed states: whoever reads one refuses it in a sentence, or goes on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.journal.party_copy import JournalCopy
from fedmezo_core.machines.run_state import EPOCH_MAX, RunState
from fedmezo_core.machines.state_codec import state_from_pb, state_to_pb
from fedmezo_core.records import (
    Answered,
    Committed,
    Genesis,
    Opened,
    Record,
    Scalars,
    SeedRange,
    SignedHead,
    Started,
)
from fedmezo_proto.v1 import journal_pb2 as pb
from fedmezo_proto.v1 import origin_pb2
from tests.faults.hand_made import try_journal, try_seal
from tests.integration.support.harness import config_of, genesis_of

SEEDS = st.integers(0, 2**32)
SOME = settings(max_examples=100)


@SOME
@given(SEEDS)
def test_a_hand_made_journal_is_read_or_refused_in_a_sentence(seed: int) -> None:
    try_journal(seed)


@SOME
@given(SEEDS)
def test_a_hand_made_sealed_state_is_read_or_refused_in_a_sentence(seed: int) -> None:
    try_seal(seed)


# What the two above have found, one by one.

POOL = config_of(seed_policy="pool", pool_size=8)
OPENED = Opened(1, 0, ("w1", "w2"))
HEAD = b"h" * 32


def folded(*records: Record) -> RunState:
    state = RunState()
    for record in records:
        state.apply(record)
    return state


def answered(slot: int, count: int) -> Answered:
    return Answered(1, slot, Scalars((0.5,) * count, None, 1))


@pytest.mark.parametrize("policy", ["per_worker", "shared", "pool"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_answer_has_as_many_scalars_as_the_contract_says(policy: str, count: int) -> None:
    genesis = genesis_of(config_of(seed_policy=policy, personal_rate="update_distance"))
    with pytest.raises(JournalCorruptError, match=f"an answer of {count} projected gradients"):
        folded(genesis, Started(1), OPENED, answered(0, count))


def test_a_copy_of_a_pool_run_holds_only_seeds_of_the_pool() -> None:
    commit = Committed(1, (SeedRange(5, (0.5,)),), 1)
    with pytest.raises(JournalCorruptError, match="seeds of the run's pool of 8"):
        folded(genesis_of(POOL), SignedHead(1, 0, HEAD), commit)


def test_no_start_follows_the_last_epoch() -> None:
    genesis = genesis_of(config_of())
    assert folded(genesis, SignedHead(EPOCH_MAX, 0, HEAD), Started(EPOCH_MAX + 1)).epoch > EPOCH_MAX
    with pytest.raises(JournalCorruptError, match="a checkpoint of epoch 4294967295"):
        folded(genesis, SignedHead(EPOCH_MAX + 1, 0, HEAD))


@pytest.mark.parametrize(
    "record",
    [
        Answered(1, 0, Scalars((float("nan"), 0.5), None, None)),
        Answered(1, 0, Scalars((0.5, 0.5), float("inf"), None)),
        SignedHead(1, 0, HEAD, b"", b"s" * 64),
    ],
)
def test_a_record_that_cannot_be_is_not_read(record: Record) -> None:
    with pytest.raises(JournalCorruptError, match="cannot be read"):
        decode_record(encode_record(record))


def test_a_copy_takes_commits_only() -> None:
    copy, genesis = JournalCopy(Journal(MemoryStore())), encode_record(genesis_of(config_of()))
    assert list(copy.begin(genesis, 1, b"")) == []
    with pytest.raises(JournalCorruptError, match="A Started record came where a commit must"):
        copy.add([encode_record(Started(1))])


def message_of() -> tuple[Genesis, origin_pb2.RunState]:
    genesis = genesis_of(config_of(buffer_answers=2, staleness_max_rounds=2, quorum=1))
    state = folded(genesis, Started(1), OPENED, answered(0, 2))
    return genesis, state_to_pb(state)


def pool_message() -> tuple[Genesis, origin_pb2.RunState]:
    genesis = genesis_of(POOL)
    return genesis, state_to_pb(folded(genesis, Started(1)))


def test_sealed_states_that_no_records_come_to() -> None:
    genesis, sound = message_of()
    assert state_from_pb(sound, genesis).round == 0
    answer = origin_pb2.AcceptedAnswer(
        epoch=1, answer=pb.Answered(round=1, slot=7, projected_grads=[1, 1])
    )
    changes: dict[str, list[origin_pb2.RunState]] = {
        "it is at round 7 of 6": [origin_pb2.RunState(round=7, rate_factor=1)],
        "it is of epoch 4294967295": [origin_pb2.RunState(epoch=2**32 - 1)],
        "it holds rounds": [
            origin_pb2.RunState(open=origin_pb2.RoundState(round=5)),
            origin_pb2.RunState(round=3, earlier=[origin_pb2.RoundState(round=1)]),
            origin_pb2.RunState(
                round=4, earlier=[origin_pb2.RoundState(round=n) for n in range(5)]
            ),
        ],
        "a round of it is not one of this run": [
            origin_pb2.RunState(open=origin_pb2.RoundState(round=1, answers=[answer])),
            origin_pb2.RunState(open=origin_pb2.RoundState(round=1, committed=[1])),
            origin_pb2.RunState(
                open=origin_pb2.RoundState(round=1, cohort=["w"], rates=[float("nan")])
            ),
        ],
        "its learning rates are -1.0 times": [origin_pb2.RunState(rate_factor=-1)],
        "a worker of it has no loss": [
            origin_pb2.RunState(rate_factor=1, losses=[origin_pb2.WorkerLosses(worker="w")])
        ],
        "before there was a first one": [
            origin_pb2.RunState(rate_factor=1, training=origin_pb2.LossWatch(high_since=1))
        ],
        "a usual size of its answers is not a number above 0": [
            origin_pb2.RunState(rate_factor=1, usual_sizes=[1.0, size])
            for size in (-1.0, 0.0, float("nan"), float("inf"))
        ],
    }
    for words, messages in changes.items():
        for message in messages:
            with pytest.raises(ProtocolError, match=words):
                state_from_pb(message, genesis)
    task = TaskConfig(kind="instruction")
    ruined = origin_pb2.LossWatch(
        newest_round=99, was_better=True, at_chance=origin_pb2.Streak(since=1, count=99)
    )
    with pytest.raises(ProtocolError, match="with a guess, whose loss nobody knows"):
        state_from_pb(
            origin_pb2.RunState(rate_factor=1, heldout=ruined), genesis_of(config_of(task=task))
        )
    genesis, message = pool_message()
    message.pool.coefficients[3] = float("inf")
    with pytest.raises(ProtocolError, match="its pool has a number that is not finite"):
        state_from_pb(message, genesis)
