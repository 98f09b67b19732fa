"""What the demo makes of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.demo import summary
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb


def finished() -> wire.GetStatusResponse:
    digest = b"d" * 32
    return wire.GetStatusResponse(
        config=pb.RunConfig(run_id="demo", model="tiny", rounds=2),
        phase=wire.PHASE_FINISHED,
        round=2,
        trainable_bytes=1_000_000,
        workers=[
            wire.WorkerStatus(worker=name, bytes_up=100, bytes_down=400) for name in ("a", "b")
        ],
        evaluations=[
            pb.Evaluated(round=0, loss=1.0, accuracy=0.5, rows=10, weights_digest=digest, auc=0.6),
            pb.Evaluated(round=2, loss=0.5, accuracy=0.8, rows=10, weights_digest=digest, auc=0.7),
        ],
        digests=[
            wire.PartyDigest(party=party, round=2, weights_digest=digest)
            for party in ("a", "b", "replica")
        ],
        recent_rounds=[wire.RoundStatus(round=n, mean_loss=1.0 / n, answers=2) for n in (1, 2)],
    )


def named(status: wire.GetStatusResponse) -> dict[str, float]:
    return {each["name"]: each["value"] for each in summary.figures(status, 12.5, 20.0)}


def test_the_figures_are_a_list_of_named_values(tmp_path: Path) -> None:
    summary.write_json(summary.figures(finished(), 12.5, 20.0), tmp_path / "reports/demo.json")
    values = json.loads((tmp_path / "reports/demo.json").read_text())
    assert all(set(value) == {"name", "value", "unit", "goal"} for value in values)
    found = {value["name"]: value["value"] for value in values}
    assert found["bytes up, all workers"] == 200
    assert found["bytes to ship the trained weights, each way"] == 4_000_000
    assert found["uplink a round and worker"] == 50
    assert found["parties whose final digests are equal"] == 3
    assert found["run time, with the fit"] == 12.5
    assert found["CPU time of all processes"] == 20.0


def test_a_party_with_other_weights_is_not_counted_as_equal() -> None:
    status = finished()
    status.digests[0].weights_digest = b"e" * 32
    assert named(status)["parties whose final digests are equal"] == 2


def test_the_tables_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_tables(finished(), 65.0, 90.0, with_back_propagation=False)
    said = capsys.readouterr().out
    assert "50.0 %" in said
    assert "80.0 %" in said
    assert "All parties hold the same weights" in said
    assert "1:05" in said
    assert "back-propagation" not in said
    summary.write_plot(finished(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_back_propagation_stands_beside_the_demos_own_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary.print_tables(finished(), 65.0, 90.0, with_back_propagation=True)
    said = capsys.readouterr().out
    assert "90.8 %" in said
    assert "87.1 %" in said
    assert "docs/experiments.md" in said
    summary.write_plot(finished(), tmp_path / "demo.png", with_back_propagation=True)


def test_back_propagations_results_are_those_of_the_experiments() -> None:
    text = (Path(__file__).parents[2] / "docs/experiments.md").read_text()
    on_a_cpu = text[text.index("`make experiment-accuracy`:") :]
    for each in summary.BACK_PROPAGATION:
        assert f"{each.accuracy:.3f}".lstrip("0") in on_a_cpu
        assert f"{each.auc:.3f}".lstrip("0") in on_a_cpu
        assert f"{each.bytes_up:,}" in on_a_cpu


def test_weights_that_differ_are_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    status = finished()
    status.digests[0].weights_digest = b"e" * 32
    summary.print_tables(status, 65.0, 90.0, with_back_propagation=False)
    assert "The weights DIFFER" in capsys.readouterr().out
