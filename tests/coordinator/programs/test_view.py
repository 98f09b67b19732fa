"""What a person sees of a run."""

from __future__ import annotations

import pytest
from rich.console import Console

from fedmezo_coordinator.programs.fedmezo_command import status_values
from fedmezo_coordinator.programs.view import (
    agreement,
    duration_text,
    run_line,
    run_view,
    seconds_left,
    size_text,
)
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1.journal_pb2 import Diverged, Evaluated
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


def test_the_time_left_is_at_the_pace_so_far() -> None:
    assert seconds_left(status(), (20, 100.0), 140.0) == 120.0
    assert seconds_left(status(), (40, 100.0), 140.0) is None
    assert seconds_left(status(phase=wire.PHASE_FINISHED), (20, 100.0), 140.0) is None


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
        "loss [nan] [/] of round 3",
        "w[1]: no [text] in it [/red]",
        "round 1: w[1] holds",
    ):
        assert shown in said
    assert said.count("w[1]") == 3
