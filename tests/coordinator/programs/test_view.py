"""What a person sees of a run."""

from __future__ import annotations

import pytest
from rich.console import Console

from fedmezo_coordinator.programs.plain_values import status_values
from fedmezo_coordinator.programs.view import (
    Pace,
    agreement,
    duration_text,
    run_line,
    run_view,
    size_text,
)
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1.journal_pb2 import Diverged, Evaluated, Excluded
from tests.integration.support.harness import config_of


def status(**more: object) -> wire.GetStatusResponse:
    values: dict[str, object] = {
        "config": config_to_pb(config_of(rounds=100)),
        "phase": wire.PHASE_OPEN,
        "round": 40,
        "head": b"h" * 32,
        "records": 1234,
    }
    return wire.GetStatusResponse(**(values | more))  # type: ignore[arg-type]


def text_of(answer: wire.GetStatusResponse, **more: float) -> str:
    console = Console(width=160, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(run_view(answer, **more))
    return captured.get()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (12_100, "12.1 kB"), (1.3e6, "1.3 MB"), (5e12, "5,000.0 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def estimates(times_s: list[float], **more: object) -> list[float | None]:
    """What is estimated after each round of a run of 40, whose rounds take so long."""
    pace, now_s, found = Pace(), 100.0, []
    for round_, time_s in enumerate(times_s, start=1):
        now_s += time_s
        answer = status(config=config_to_pb(config_of(rounds=40)), round=round_, **more)
        found.append(pace.seconds_left(answer, now_s))
    return found


def test_the_time_left_is_at_the_pace_of_the_newest_rounds() -> None:
    found = estimates([2.0] * 20)
    assert found[:11] == [None] * 11
    assert found[11:] == [2.0 * (40 - round_) for round_ in range(12, 21)]


def test_no_time_is_told_before_the_pace_is_known() -> None:
    # Ten slow rounds, in which rows are computed for the first time.
    found = estimates([8.0] * 10 + [1.0] * 20)
    told = [(round_, left) for round_, left in enumerate(found, start=1) if left is not None]
    assert all(left <= 1.3 * (40 - round_) for round_, left in told)
    assert len(told) > 10
    assert estimates([1.0] * 20, phase=wire.PHASE_PAUSED) == [None] * 20
    assert estimates([1.0] * 20, phase=wire.PHASE_FINISHED) == [None] * 20


def test_the_time_left_falls_while_a_round_runs() -> None:
    pace = Pace()
    for round_ in range(60, 69):
        left = pace.seconds_left(status(round=round_), 10.0 * round_)
    assert left == 320.0
    assert pace.seconds_left(status(round=68), 684.0) == 316.0


def digest(party: str, round_: int, value: bytes) -> wire.PartyDigest:
    return wire.PartyDigest(party=party, round=round_, weights_digest=value * 32)


def test_parties_agree_if_the_newest_digests_are_equal() -> None:
    assert agreement(status()) == (True, "no digests yet")
    old = digest("w1", 3, b"x")
    equal, text = agreement(status(digests=[old, digest("w2", 4, b"a"), digest("w3", 4, b"a")]))
    assert equal
    assert text == "round 4: w2, w3 hold 6161616161616161"
    equal, text = agreement(status(digests=[digest("w2", 4, b"a"), digest("w3", 4, b"b")]))
    assert not equal
    assert "DIFFER" in text


def test_the_view_shows_round_loss_accuracy_traffic_and_divergences() -> None:
    text = text_of(
        status(
            recent_rounds=[wire.RoundStatus(round=40, mean_loss=0.5, answers=2)],
            evaluations=[
                Evaluated(round=0, loss=0.7, accuracy=0.5, rows=10),
                Evaluated(round=40, loss=0.6, accuracy=0.75, rows=10, auc=0.875),
            ],
            workers=[
                wire.WorkerStatus(
                    worker="w1", connected=True, measuring=True, bytes_up=1500, rounds_answered=40
                ),
                wire.WorkerStatus(worker="w2", complaint="the loss is nan"),
                wire.WorkerStatus(worker="w3", connected=True),
                wire.WorkerStatus(worker="w4", connected=True, diverged=True),
            ],
            diverged_parties=["w4"],
            divergences=[
                Diverged(round=9, party="w4", found_digest64=1, expected_digest64=2),
            ],
        ),
        seconds_left=75.0,
    )
    for words in (
        "40 of 100 (open, about 1:15 left)",
        "training loss",
        "0.5000",
        "accuracy 50.0 %",
        "accuracy 75.0 %, AUC 0.875",
        "measuring",
        "away",
        "ready",
        "diverged",
        "1.5 kB",
        "the loss is nan",
        "w4 diverged after round 9",
        "1,234 records",
    ):
        assert words in text


def test_the_best_evaluation_is_shown_if_it_is_not_the_last() -> None:
    evaluations = [
        Evaluated(round=round_, loss=loss, accuracy=0.5, rows=10)
        for round_, loss in ((0, 0.9), (10, 0.5), (20, 0.5), (30, 0.6))
    ]
    text = text_of(status(evaluations=evaluations))
    assert "best" in text
    assert "round 10: loss 0.5000" in text
    assert "best at round 10: loss 0.5000" in run_line(status(evaluations=evaluations))
    assert status_values(status(evaluations=evaluations))["best"]["loss"] == 0.5
    better = [*evaluations, Evaluated(round=40, loss=0.4, accuracy=0.5, rows=10)]
    assert "best" not in text_of(status(evaluations=better))
    assert "best" not in run_line(status(evaluations=better))
    assert status_values(status())["best"] is None


def test_a_worker_that_left_a_finished_run_is_done() -> None:
    gone = [wire.WorkerStatus(worker="w1", rounds_answered=100)]
    text = text_of(status(phase=wire.PHASE_FINISHED, round=100, workers=gone))
    assert "done" in text
    assert "away" not in text


def test_a_divergence_that_was_mended_is_no_alarm() -> None:
    found = Diverged(round=9, party="w4", found_digest64=1, expected_digest64=2)
    text = text_of(status(diverged_parties=["w4"], divergences=[found, found]))
    alarm = "w4 diverged after round 9: digest 0100000000000000, the run's 0200000000000000"
    assert text.count(alarm) == 1
    text = text_of(status(divergences=[found, found]))
    assert "w4 diverged after" not in text
    assert "diverged earlier, with the run's weights again: w4 (round 9)" in text


def test_counters_say_since_when_they_count() -> None:
    worker = wire.WorkerStatus(worker="w1", bytes_up=1500)
    answer = status(workers=[worker], epoch=3, uptime_ms=75_000)
    assert "count since start 3 of the run, 1:15 ago" in text_of(answer)
    assert "down 0 B since start 3 of the run" in run_line(answer)
    assert "start" not in run_line(status(workers=[worker], epoch=1, uptime_ms=75_000))


def test_what_the_replica_is_still_to_do_and_what_is_wrong_with_it() -> None:
    text = text_of(status(replica_complaint="the replica ended (killed) and is started again"))
    assert "the replica ended (killed) and is started again" in text
    assert "evaluated" not in text
    due = status(phase=wire.PHASE_FINISHED, round=100, evaluation_due=True)
    assert "the last weights are being evaluated" in text_of(due)
    assert run_line(due).endswith("; finished; the last weights are being evaluated")


def test_a_paused_run_says_how_it_goes_on_among_others_too() -> None:
    config = config_to_pb(config_of())
    config.run_id = "r1"
    said = text_of(status(config=config, phase=wire.PHASE_PAUSED, reason="the loss rose"))
    assert "to continue all the same: fedmezo run resume r1" in said


def test_what_stands_in_brackets_is_shown() -> None:
    config = config_to_pb(config_of())
    config.run_id, config.model = "run[red]", "org/model[bold]:smile:"
    said = text_of(
        status(
            config=config,
            phase=wire.PHASE_PAUSED,
            reason="loss [nan] [/] of round 3",
            workers=[wire.WorkerStatus(worker="w[1]", complaint="no [text] in it [/red]")],
            digests=[digest("w[1]", 1, b"a")],
        )
    )
    for shown in (
        "run[red] on org/model[bold]:smile:",
        "fedmezo run resume run[red]",
        "loss [nan] [/] of round 3",
        "w[1]: no [text] in it [/red]",
        "round 1: w[1] holds",
    ):
        assert shown in said
    assert said.count("w[1]") == 3


def test_workers_whose_answers_look_wrong_and_those_excluded_are_named() -> None:
    text = text_of(
        status(
            workers=[wire.WorkerStatus(worker="w7", suspicion="sent answers next to zero")],
            excluded=[Excluded(round=9, worker="w[8]", reason="noise")],
        )
    )
    assert "w7: sent answers next to zero" in text
    assert "w[8]: excluded after round 9: noise" in text
