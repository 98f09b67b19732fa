"""Between a run's folded state and its message, `RunState`.

The message says everything: a state that is read from it goes on exactly as the state that was
written.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from fedmezo_core.config import COHORT_MAX, RunConfig
from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.journal.codec import (
    admitted_from_pb,
    admitted_to_pb,
    answered_from_pb,
    answered_to_pb,
    diverged_from_pb,
    diverged_to_pb,
    evaluated_from_pb,
    evaluated_to_pb,
    excluded_from_pb,
    excluded_to_pb,
    masked_from_pb,
    masked_to_pb,
    summed_from_pb,
    summed_to_pb,
)
from fedmezo_core.journal.sealed import SealedState
from fedmezo_core.machines.health import Health, LossWatch, Streak, chance_of
from fedmezo_core.machines.rates import SIGNAL_ROUNDS
from fedmezo_core.machines.roster import RoundSummary
from fedmezo_core.machines.run_state import EPOCH_MAX, EXCLUDED_MAX, Accepted, RoundState, RunState
from fedmezo_core.machines.seeds import Pool
from fedmezo_core.records import Admitted, Genesis, Paused, Stopped
from fedmezo_core.trust.secure_aggregation.fixed_point import levels_of
from fedmezo_proto.v1 import journal_pb2
from fedmezo_proto.v1 import origin_pb2 as pb

STATE_VERSION = 3
"""The way in which records are folded.

It goes up whenever equal records would give another state than before, or the state another
message: restarts then fold all records again instead of beginning from what the old way gave."""


def state_of(sealed: SealedState) -> RunState:
    """A new copy of the run's state in a sealed state; the caller may change it.

    Raises `JournalCorruptError` if the message cannot be a state.
    """
    try:
        return state_from_pb(sealed.state, sealed.genesis)
    except ProtocolError as error:
        raise JournalCorruptError(
            f"What the records before {sealed.seqno} come to cannot be read ({error}); restore the "
            "journal from a copy, or check that the versions match."
        ) from None


def state_to_pb(state: RunState) -> pb.RunState:
    """A folded state as a message, without its genesis."""
    return pb.RunState(
        epoch=state.epoch,
        round=state.round,
        open=None if state.open is None else _round_to_pb(state.open),
        earlier=[_round_to_pb(held) for held in state.earlier],
        agreed=[pb.AgreedDigest(round=r, digest64=d) for r, d in state.agreed.items()],
        diverged=[diverged_to_pb(record) for record in state.diverged.values()],
        divergences=[diverged_to_pb(record) for record in state.divergences],
        evaluations=[evaluated_to_pb(record) for record in state.evaluations],
        recent_rounds=[
            pb.RoundSummary(round=s.round, mean_loss=s.mean_loss, answers=s.answers)
            for s in state.recent_rounds
        ],
        rate_factor=state.rate_factor,
        paused=(
            None
            if state.paused is None
            else journal_pb2.Paused(round=state.paused.round, reason=state.paused.reason)
        ),
        stopped=(
            None
            if state.stopped is None
            else journal_pb2.Stopped(round=state.stopped.round, reason=state.stopped.reason)
        ),
        training=_watch_to_pb(state.health.training),
        heldout=_watch_to_pb(state.health.heldout),
        best=None if state.health.best is None else evaluated_to_pb(state.health.best),
        evaluations_since_best=state.health.evaluations_since_best,
        pool=(
            None
            if state.pool is None
            else pb.PoolState(
                coefficients=state.pool.coefficients,
                decay=state.pool.decay,
                sizes=state.pool.sizes,
                counts=state.pool.counts,
            )
        ),
        losses=[pb.WorkerLosses(worker=w, losses=losses) for w, losses in state.losses.items()],
        distances=[pb.WorkerDistance(worker=w, distance=d) for w, d in state.distances.items()],
        copied=state.copied,
        zeros=_streak_to_pb(state.health.zeros),
        worsening=_streak_to_pb(state.health.worsening),
        usual_sizes=state.usual_sizes,
        excluded=[excluded_to_pb(record) for record in state.excluded.values()],
        keys=[admitted_to_pb(Admitted(w, key)) for w, key in state.keys.items()],
    )


def state_from_pb(message: pb.RunState, genesis: Genesis) -> RunState:
    """The folded state of a run; `ProtocolError` if the message cannot be one."""
    state = RunState()
    state.apply(genesis)
    state.epoch, state.round = message.epoch, message.round
    state.open = _round_from_pb(message.open) if message.HasField("open") else None
    state.earlier.extend(_round_from_pb(held) for held in message.earlier)
    state.agreed.update((one.round, one.digest64) for one in message.agreed)
    for diverged in message.diverged:
        state.diverged[diverged.party] = diverged_from_pb(diverged)
    state.divergences.extend(diverged_from_pb(one) for one in message.divergences)
    state.evaluations.extend(evaluated_from_pb(one) for one in message.evaluations)
    state.recent_rounds.extend(
        RoundSummary(one.round, one.mean_loss if one.HasField("mean_loss") else None, one.answers)
        for one in message.recent_rounds
    )
    state.rate_factor = message.rate_factor
    if message.HasField("paused"):
        state.paused = Paused(message.paused.round, message.paused.reason)
    if message.HasField("stopped"):
        state.stopped = Stopped(message.stopped.round, message.stopped.reason)
    state.health = Health(
        training=_watch_from_pb(message.training),
        heldout=_watch_from_pb(message.heldout),
        best=evaluated_from_pb(message.best) if message.HasField("best") else None,
        evaluations_since_best=message.evaluations_since_best,
        worsening=_streak_from_pb(message.worsening),
        zeros=_streak_from_pb(message.zeros),
    )
    if state.pool is not None:
        _fill_pool(state.pool, message.pool)
    for one in message.losses:
        state.losses[one.worker] = deque(one.losses, maxlen=SIGNAL_ROUNDS)
    state.distances.update((one.worker, one.distance) for one in message.distances)
    state.usual_sizes.extend(message.usual_sizes)
    for excluded in message.excluded:
        state.excluded[excluded.worker] = excluded_from_pb(excluded)
    for admitted in map(admitted_from_pb, message.keys):
        state.keys[admitted.worker] = admitted.key
    state.copied = message.copied
    _check(state, genesis.config)
    return state


def _check(state: RunState, config: RunConfig) -> None:
    """Raise `ProtocolError` for a state that no records come to; later code relies on it."""
    for what in _wrong_in(state, config):
        raise ProtocolError(what)


def _wrong_in(state: RunState, config: RunConfig) -> Iterator[str]:
    held = [*state.earlier, *([] if state.open is None else [state.open])]
    rounds = [one.round for one in held]
    newest = state.round + (state.open is not None)
    if newest > config.rounds:
        yield f"it is at round {state.round} of {config.rounds}"
    if state.epoch > EPOCH_MAX:
        yield f"it is of epoch {state.epoch}"
    if len(state.earlier) > min(config.staleness_max + 1, state.round) or rounds != list(
        range(newest + 1 - len(rounds), newest + 1)
    ):
        yield f"it holds rounds {rounds} after round {state.round}"
    if not all(_is_sound(one, config) for one in held):
        yield "a round of it is not one of this run"
    if not (math.isfinite(state.rate_factor) and state.rate_factor > 0):
        yield f"its learning rates are {state.rate_factor!r} times the contract's"
    if not all(losses and math.isfinite(sum(losses)) for losses in state.losses.values()):
        yield "a worker of it has no loss, or one that is not finite"
    watches = (state.health.training, state.health.heldout)
    if any(watch.high_since is not None and watch.first is None for watch in watches):
        yield "it has a loss that was high before there was a first one"
    if chance_of(config) is None and any(w.was_better or w.at_chance.count for w in watches):
        yield "it compares losses with a guess, whose loss nobody knows in this run"
    if not all(math.isfinite(size) and size > 0 for size in state.usual_sizes):
        yield "a usual size of its answers is not a number above 0"
    if len(state.excluded) > EXCLUDED_MAX:
        yield f"it excludes {len(state.excluded)} workers"
    pool = state.pool
    if pool is not None and not math.isfinite(pool.decay + sum(pool.coefficients + pool.sizes)):
        yield "its pool has a number that is not finite"


def _is_sound(held: RoundState, config: RunConfig) -> bool:
    answered = held.answers.keys()
    return (
        len(held.cohort) <= COHORT_MAX
        and all(math.isfinite(rate) and rate > 0 for rate in held.rates)
        and all(0 <= slot < len(held.cohort) for slot in answered)
        and held.excluded <= answered
        and held.committed <= answered
        and held.excluded.isdisjoint(held.slots.values())
        and all(
            accepted.record.round == held.round
            and len(accepted.record.projected_grads) == config.scalars_per_answer
            for accepted in held.answers.values()
        )
        and _is_sound_sum(held, config)
    )


def _is_sound_sum(held: RoundState, config: RunConfig) -> bool:
    if held.masked is None:
        return held.summed is None
    slots = held.masked.slots
    is_sum = (
        config.secure_aggregation
        and held.masked.round == held.round
        and list(slots) == sorted(held.answers.keys() & set(slots))
        and config.secure_cohort_min <= len(slots) <= config.answers_max
    )
    if held.summed is None or not is_sum:
        return is_sum
    most = levels_of(config) * len(slots)
    return (
        held.summed.round == held.round
        and len(held.summed.sums) in (0, config.pairs_per_answer)
        and all(abs(total) <= most for total in held.summed.sums)
    )


def _fill_pool(pool: Pool, message: pb.PoolState) -> None:
    size = len(pool.coefficients)
    if not len(message.coefficients) == len(message.sizes) == len(message.counts) == size:
        raise ProtocolError(f"its pool has not the {size} seeds of the run's")
    pool.coefficients = list(message.coefficients)
    pool.decay = message.decay
    pool.sizes = list(message.sizes)
    pool.counts = list(message.counts)


def _round_to_pb(held: RoundState) -> pb.RoundState:
    return pb.RoundState(
        round=held.round,
        cohort=held.cohort,
        slots=held.slots.values(),
        answers=[
            pb.AcceptedAnswer(epoch=accepted.epoch, answer=answered_to_pb(accepted.record))
            for accepted in held.answers.values()
        ],
        excluded=sorted(held.excluded),
        committed=sorted(held.committed),
        rates=held.rates,
        eps=held.eps,
        masked=None if held.masked is None else masked_to_pb(held.masked),
        summed=None if held.summed is None else summed_to_pb(held.summed),
    )


def _round_from_pb(message: pb.RoundState) -> RoundState:
    cohort = list(message.cohort)
    if len(message.rates) != len(cohort) or any(slot >= len(cohort) for slot in message.slots):
        raise ProtocolError(f"its round {message.round} has slots of no worker, or without a rate")
    held = RoundState(message.round, cohort)
    held.slots = {cohort[slot]: slot for slot in message.slots}
    for one in message.answers:
        held.answers[one.answer.slot] = Accepted(one.epoch, answered_from_pb(one.answer))
    held.excluded = set(message.excluded)
    held.committed = set(message.committed)
    held.rates = list(message.rates)
    held.eps = message.eps if message.HasField("eps") else None
    held.masked = masked_from_pb(message.masked) if message.HasField("masked") else None
    held.summed = summed_from_pb(message.summed) if message.HasField("summed") else None
    return held


def _watch_to_pb(watch: LossWatch) -> pb.LossWatch:
    return pb.LossWatch(
        first=watch.first,
        newest=watch.newest,
        newest_round=watch.newest_round,
        high_since=watch.high_since,
        better=_streak_to_pb(watch.better),
        was_better=watch.was_better,
        at_chance=_streak_to_pb(watch.at_chance),
    )


def _watch_from_pb(message: pb.LossWatch) -> LossWatch:
    return LossWatch(
        first=message.first if message.HasField("first") else None,
        newest=message.newest,
        newest_round=message.newest_round,
        high_since=message.high_since if message.HasField("high_since") else None,
        better=_streak_from_pb(message.better),
        was_better=message.was_better,
        at_chance=_streak_from_pb(message.at_chance),
    )


def _streak_to_pb(streak: Streak) -> pb.Streak:
    return pb.Streak(since=streak.since, count=streak.count)


def _streak_from_pb(message: pb.Streak) -> Streak:
    return Streak(message.since if message.HasField("since") else None, message.count)
