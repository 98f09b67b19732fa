"""What counts as an alarm, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.web.run_alarms import (
    ALARMS_OF_A_KIND_MAX,
    AlarmKind,
    alarms_of,
    counted_by_kind,
    shortened,
)
from fedmezo_coordinator.web.run_series import RunSeries
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

Change = Callable[[wire.GetStatusResponse], None]


def kinds(
    status: wire.GetStatusResponse | None,
    series: RunSeries | None = None,
    phase: int = runs.RUN_PHASE_RUNNING,
    reason: str = "",
) -> list[AlarmKind]:
    return [alarm.kind for alarm in alarms_of(phase, reason, status, series or RunSeries())]


def sound() -> wire.GetStatusResponse:
    return MadeRun(workers=8, rounds=0).told


def _diverged(status: wire.GetStatusResponse) -> None:
    status.diverged_parties.append("replica")


def _slow(status: wire.GetStatusResponse) -> None:
    status.workers[0].answered_after_ms = 60_000


def _away(status: wire.GetStatusResponse) -> None:
    status.workers[0].connected = False


def _suspected(status: wire.GetStatusResponse) -> None:
    status.workers[0].suspicion = "its answers are far larger than usual"


def _complaining(status: wire.GetStatusResponse) -> None:
    status.workers[0].complaint = "cannot measure"


def _excluding(status: wire.GetStatusResponse) -> None:
    status.excluded.add(worker="w1", round=1, reason="a defect")


def _without_replica(status: wire.GetStatusResponse) -> None:
    status.replica_complaint = "it ended"


def _late(status: wire.GetStatusResponse) -> None:
    status.loop_lag_p99_ms = 900


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_diverged, AlarmKind.DIGEST_MISMATCH),
        (_slow, AlarmKind.STRAGGLER),
        (_away, AlarmKind.AWAY),
        (_suspected, AlarmKind.OUTLIER),
        (_complaining, AlarmKind.COMPLAINT),
        (_excluding, AlarmKind.EXCLUDED),
        (_without_replica, AlarmKind.REPLICA),
        (_late, AlarmKind.OVERLOAD),
    ],
)
def test_each_kind_is_found_and_a_sound_run_has_none(change: Change, kind: AlarmKind) -> None:
    status = sound()
    assert kinds(status) == []
    change(status)
    assert kinds(status) == [kind]


def test_a_run_that_stands_still_comes_first_and_says_why() -> None:
    status = sound()
    _suspected(status)
    found = alarms_of(runs.RUN_PHASE_PAUSED, "the loss is high", status, RunSeries())
    assert [alarm.kind for alarm in found] == [AlarmKind.PAUSED, AlarmKind.OUTLIER]
    assert found[0].sentence == "the loss is high"
    assert kinds(None, phase=runs.RUN_PHASE_FAILED) == [AlarmKind.FAILED]


def test_who_does_not_take_part_is_told_with_the_reason() -> None:
    why = "this worker allows at most 10 rounds"
    [alarm] = alarms_of(runs.RUN_PHASE_RUNNING, "", sound(), RunSeries(), {"w1": why})
    assert (alarm.kind, alarm.is_urgent) == (AlarmKind.DECLINED, False)
    assert alarm.sentence == f"w1 does not take part: {why}"


def test_a_loss_that_rises_is_an_alarm_and_one_that_falls_is_not() -> None:
    rising, falling = RunSeries(), RunSeries()
    for round_ in range(1, 21):
        rising.losses.add(round_, 0.5 + 0.05 * round_)
        falling.losses.add(round_, 1.5 - 0.05 * round_)
    assert kinds(sound(), rising) == [AlarmKind.DIVERGENCE]
    assert kinds(sound(), falling) == []


def test_who_is_away_from_a_finished_run_is_no_alarm() -> None:
    status = sound()
    _away(status)
    assert kinds(status, phase=runs.RUN_PHASE_FINISHED) == []


def test_a_thousand_alarms_of_a_kind_are_counted_and_few_are_told() -> None:
    status = MadeRun(workers=1000, rounds=0).told
    for worker in status.workers:
        worker.suspicion, worker.connected = "its answers repeat", True
    found = alarms_of(runs.RUN_PHASE_RUNNING, "", status, RunSeries())
    assert counted_by_kind(found)[AlarmKind.OUTLIER] == 1000
    told = shortened(found)
    assert len(told) == ALARMS_OF_A_KIND_MAX + 1
    assert "980 more" in told[-1].sentence
