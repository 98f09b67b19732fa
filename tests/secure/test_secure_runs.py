"""Runs with secure aggregation over the library: sums are exact, or there are none."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo import Coordinator, Session
from fedmezo.auditing import audit_of
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.machines.aggregate import Share, coefficients_of
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.machines.state_codec import state_from_pb, state_to_pb
from fedmezo_core.records import Answered, Committed, Genesis, Masked, Opened, Summed
from fedmezo_core.trust.secure_aggregation.fixed_point import levels_of, mean_of_sums, quantised
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of
from tests.library.light_engine import LightEngine
from tests.library.test_both_sides import check, open_session, records_in, run_over_a_bad_network

NAMES = ("a", "b", "c", "d")
TURNS_MAX = 20_000


def secure_run(**changes: Any) -> Genesis:
    values: dict[str, Any] = {
        "secure_aggregation": True,
        "seed_policy": "shared",
        "aggregation": "mean",
        "clip_median_factor": 0.0,
        "projected_grad_abs_max": 100.0,
        "report_losses": False,
        "workers_min": 4,
        "quorum": 3,
        "rounds": 4,
        "local_steps": 2,
        "probes": 3,
    }
    return genesis_of(config_of(**values | changes))


def sums_of(config: RunConfig, round_: int, workers: list[str]) -> tuple[int, ...]:
    """What the workers' integers add up to, computed in the clear."""
    seeds = seeds_of(config, round_, 0, None)
    columns = zip(
        *(quantised([LightEngine(w)._number(s) for s in seeds], config) for w in workers),
        strict=True,
    )
    return tuple(map(sum, columns))


def check_sums(store: MemoryStore, config: RunConfig) -> list[int]:
    """Every sum is that of its workers, every commit that of its sum; returns their sizes."""
    cohorts: dict[int, list[str]] = {}
    masked: Masked | None = None
    summed: Summed | None = None
    sizes = []
    for record in records_in(store):
        match record:
            case Opened(round_, _, workers):
                cohorts.setdefault(round_, []).extend(workers)
            case Answered():
                assert record.projected_grads == ()
            case Masked():
                assert masked is None
                masked = record
            case Summed():
                assert masked is not None
                assert summed is None
                summed = record
            case Committed(round_, (one,)):
                assert masked is not None
                assert summed is not None
                summands = [cohorts[round_][slot] for slot in masked.slots]
                sums = sums_of(config, round_, summands)
                assert summed.sums in (sums, ())
                assert len(summands) >= config.secure_cohort_min
                mean = mean_of_sums(summed.sums or [0] * len(sums), len(summands), config)
                share = Share(seeds_of(config, round_, 0, None), mean, config.learning_rate)
                [expected] = coefficients_of([share], config)
                assert one.coefficients == expected
                sizes.append(len(summands) if summed.sums else 0)
                masked = summed = None
    return sizes


def run_in_order(
    genesis: Genesis, store: MemoryStore, keys: dict[str, Ed25519PrivateKey] | None = None
) -> tuple[Coordinator, dict[str, Session]]:
    coordinator = Coordinator(genesis, store)
    sessions = {
        name: Session(genesis, name, LightEngine(name), signing_key=(keys or {}).get(name))
        for name in NAMES
    }
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    for turn in range(TURNS_MAX):
        if coordinator.done:
            return coordinator, sessions
        coordinator.tick(turn * 20)
        for name, session in sessions.items():
            for down in coordinator.outgoing(name):
                for up in session.receive(down):
                    coordinator.receive(name, up)
    raise AssertionError("the run did not end")


def test_four_workers_end_with_the_digest_of_the_plain_sums() -> None:
    genesis, store = secure_run(), MemoryStore()
    coordinator, sessions = run_in_order(genesis, store)
    check(store, coordinator.config)
    assert check_sums(store, coordinator.config) == [4, 4, 4, 4]
    plain = LightEngine("plain")
    plain.apply([record for record in records_in(store) if isinstance(record, Committed)])
    assert set(coordinator.digests.values()) == {plain.digest()}
    assert {session.round for session in sessions.values()} == {4}


@pytest.mark.parametrize("when", range(1, 5))
def test_a_worker_that_drops_out_at_any_step_is_left_out_of_the_sum(when: int) -> None:
    """It answers the step before, then nothing more; the other three go on without it."""
    genesis, store = secure_run(rounds=1), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    asked = 0
    gone = False
    for turn in range(TURNS_MAX):
        if coordinator.done:
            break
        coordinator.tick(turn * 20)
        for name, session in sessions.items():
            if name == "d" and gone:
                continue
            for down in coordinator.outgoing(name):
                is_ask = wire.SessionResponse.FromString(down).HasField("sum_ask")
                asked += is_ask and name == "d"
                if name == "d" and asked == when:
                    coordinator.disconnect("d")
                    gone = True
                    break
                for up in session.receive(down):
                    coordinator.receive(name, up)
    assert gone
    config = coordinator.config
    # Who drops out in the last step is in the sum already, and its masks come off.
    assert check_sums(store, config) == [4 if when == 4 else 3]
    digests = {coordinator.digests[name] for name in "abc"}
    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(12))
def test_a_bad_network_and_restarts_give_exact_sums_or_none(seed: int) -> None:
    genesis, store = secure_run(workers_min=3, deadline_ms=20_000), MemoryStore()
    sessions = {name: open_session(genesis, name) for name in NAMES}
    coordinator = run_over_a_bad_network(
        random.Random(seed), lambda: Coordinator(genesis, store), sessions, 0.002
    )
    check(store, coordinator.config)
    check_sums(store, coordinator.config)
    assert len(set(coordinator.digests.values())) == 1


def test_workers_that_sign_take_part_with_each_other() -> None:
    genesis, store = secure_run(), MemoryStore()
    keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
    coordinator, _ = run_in_order(genesis, store, keys)
    assert check_sums(store, coordinator.config) == [4, 4, 4, 4]


def test_a_worker_that_signs_takes_no_part_with_one_that_does_not() -> None:
    """Otherwise whoever is between them could leave the signatures out."""
    genesis, store = secure_run(deadline_ms=3000), MemoryStore()
    keys = {name: Ed25519PrivateKey.generate() for name in NAMES[:3]}
    with pytest.raises(AssertionError, match="did not end"):
        run_in_order(genesis, store, keys)
    assert not [record for record in records_in(store) if isinstance(record, Masked)]


def test_a_plain_answer_is_refused() -> None:
    genesis, store = secure_run(), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    for name, session in sessions.items():
        for down in coordinator.outgoing(name):
            for up in session.receive(down):
                message = wire.SessionRequest.FromString(up)
                if name == "a" and message.HasField("answer"):
                    assert not message.answer.projected_grads
                    message.answer.projected_grads.extend([1.0] * 6)
                coordinator.receive(name, message.SerializeToString())
    refused = [
        response.refused.message
        for down in coordinator.outgoing("a")
        if (response := wire.SessionResponse.FromString(down)).HasField("refused")
    ]
    assert "in the clear" in refused[0]
    assert sum(isinstance(record, Answered) for record in records_in(store)) == 3


def test_the_step_is_far_below_the_noise_of_a_batch() -> None:
    """With the defaults, a number is off by at most 1.5e-6; honest ones are .01 to 70."""
    config = secure_run().config
    assert levels_of(config) == (2**31 - 1) // 64
    for grad in (0.0123, -70.4, 1e-9, 100.0, -100.0):
        (integer,) = quantised([grad], config)
        assert abs(mean_of_sums([integer], 1, config)[0] - grad) <= 1.5e-6
    assert quantised([1e6, -1e6], config) == (levels_of(config), -levels_of(config))


# ---------------------------------------------------------------- restarts, exclusions, seals


def stored_run(**changes: Any) -> tuple[Genesis, MemoryStore]:
    genesis, store = secure_run(**changes), MemoryStore()
    run_in_order(genesis, store)
    return genesis, store


def cut_after(store: MemoryStore, kind: type) -> MemoryStore:
    """A store with the records up to the first of a kind, as a crash leaves it."""
    kept = MemoryStore()
    for row, record in zip(store.read(0, 10**6), records_in(store), strict=True):
        kept.append([row])
        if isinstance(record, kind):
            return kept
    raise AssertionError(f"no {kind.__name__}")


def test_a_restart_while_a_sum_is_unmasked_leaves_that_step_out() -> None:
    genesis, store = stored_run()
    rest = cut_after(store, Masked)
    coordinator, _ = run_in_order(genesis, rest)
    check(rest, coordinator.config)
    assert check_sums(rest, coordinator.config) == [0, 4, 4, 4]
    first = next(record for record in records_in(rest) if isinstance(record, Committed))
    assert not any(first.seed_ranges[0].coefficients)
    assert first.decay == 1.0


def test_a_round_without_a_sum_does_not_decay() -> None:
    genesis, store = stored_run(weight_decay=0.5)
    rest = cut_after(store, Masked)
    run_in_order(genesis, rest)
    commits = [record for record in records_in(rest) if isinstance(record, Committed)]
    assert commits[0].decay == 1.0
    assert commits[1].decay < 1.0


@pytest.mark.parametrize("kind", [Opened, Answered])
def test_a_restart_before_that_begins_another_sum(kind: type) -> None:
    genesis, store = stored_run()
    rest = cut_after(store, kind)
    coordinator, _ = run_in_order(genesis, rest)
    assert check_sums(rest, coordinator.config) == [4, 4, 4, 4]


@pytest.mark.parametrize("when", range(1, 5))
def test_an_excluded_worker_is_in_no_sum(when: int) -> None:
    """Before the last step another sum is begun; in the last step there is none."""
    genesis, store = secure_run(rounds=1), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    asked = 0
    for turn in range(TURNS_MAX):
        if coordinator.finished:
            break
        coordinator.tick(turn * 20)
        for name in sorted(coordinator.workers):
            for down in coordinator.outgoing(name):
                asked += name == "a" and wire.SessionResponse.FromString(down).HasField("sum_ask")
                if name == "a" and asked == when and "a" in coordinator.workers:
                    coordinator.exclude("a", "it is the test's")
                    break
                for up in sessions[name].receive(down):
                    coordinator.receive(name, up)
    assert check_sums(store, coordinator.config) == [0 if when == 4 else 3]


def test_the_state_of_every_prefix_is_sealed_and_read() -> None:
    _, store = stored_run(rounds=2)
    state, genesis = RunState(), None
    for record in records_in(store):
        state.apply(record)
        if isinstance(record, Genesis):
            genesis = record
        assert genesis is not None
        assert state_from_pb(state_to_pb(state), genesis) == state


@pytest.mark.parametrize(
    "wrong",
    [
        Masked(1, (0, 1)),
        Masked(1, (0, 1, 9)),
        Masked(1, (2, 1, 0)),
        Masked(2, (0, 1, 2)),
        Summed(1, (1,) * 6),
    ],
)
def test_sums_that_cannot_be_are_refused_by_the_fold(wrong: Masked | Summed) -> None:
    _, store = stored_run(rounds=1)
    state = RunState()
    for record in records_in(store):
        if isinstance(record, Masked):
            break
        state.apply(record)
    with pytest.raises(JournalCorruptError):
        state.apply(wrong)
    state.apply(Masked(1, (0, 1, 2)))
    for after in (
        Masked(1, (0, 1, 2)),
        Summed(1, (1,) * 5),
        Summed(1, (2**31 - 1,) * 6),
    ):
        with pytest.raises(JournalCorruptError):
            state.apply(after)


def test_there_is_nothing_to_audit() -> None:
    _, store = stored_run(rounds=1)
    with pytest.raises(ConfigError, match="nothing to audit"):
        audit_of(Journal(store), "a", None)
