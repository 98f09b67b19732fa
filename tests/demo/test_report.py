"""What the demo makes of a finished run, and of a user's own folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from deploy.demo import summary as report
from deploy.demo.__main__ import plan
from fedmezo_core.errors import ConfigError
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


def test_the_figures_are_a_list_of_named_values(tmp_path: Path) -> None:
    report.write_json(report.figures(finished(), 12.5), tmp_path / "reports/demo.json")
    values = json.loads((tmp_path / "reports/demo.json").read_text())
    assert all(set(value) == {"name", "value", "unit", "goal"} for value in values)
    named = {value["name"]: value["value"] for value in values}
    assert named["bytes up, all workers"] == 200
    assert named["bytes to ship the weights, each way"] == 4_000_000
    assert named["uplink a round and worker"] == 50
    assert named["parties whose final digests are equal"] == 3
    assert named["run time"] == 12.5


def test_a_party_with_other_weights_is_not_counted_as_equal() -> None:
    status = finished()
    status.digests[0].weights_digest = b"e" * 32
    named = {value["name"]: value["value"] for value in report.figures(status, 1.0)}
    assert named["parties whose final digests are equal"] == 2


def test_the_table_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(finished(), 65.0)
    said = capsys.readouterr().out
    assert "50.0 %" in said
    assert "80.0 %" in said
    assert "the run took 1:05" in said
    report.write_plot(finished(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def given(data: Path) -> argparse.Namespace:
    return argparse.Namespace(model="some/model", data=str(data), seed=7, rounds=None)


def test_a_users_own_folder_needs_two_values_only(tmp_path: Path) -> None:
    for name in ("Clinic A.train.csv", "b.train.jsonl", "heldout.parquet"):
        (tmp_path / name).touch()
    made = plan(given(tmp_path))
    assert made.model == "some/model"
    assert set(made.workers) == {"clinic-a", "b"}
    assert made.heldout == tmp_path / "heldout.parquet"
    assert made.settings["run"]["seed"] == 7
    assert made.settings["run"]["workers_min"] == 2


def test_a_folder_without_the_files_is_refused_with_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold a heldout\.jsonl"):
        plan(given(tmp_path))
