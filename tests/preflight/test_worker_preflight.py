"""`fedmezo-worker preflight`: each thing that can be wrong with a machine, its rows or the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmezo.preflight.check_report import Report
from fedmezo_coordinator.admission.state_folder import make_state
from fedmezo_core.errors import StartingError, UnavailableError, VersionError, WrongRunError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient, RunDescription
from fedmezo_core.wire.snapshots import Suffix
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.preflight import worker_preflight
from fedmezo_worker.preflight.worker_preflight import preflight
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import Programs, run_values
from tests.integration.support.parties import save_model, write_rows

Checking = Callable[..., Any]


def described(genesis: Genesis, **changes: Any) -> RunDescription:
    base = RunDescription(
        protocol_version=1,
        genesis=genesis,
        head=b"h" * 32,
        round=0,
        epoch=1,
        missing=Suffix(0, 0),
        snapshot=None,
        unix_ms=time.time_ns() // 1_000_000,
    )
    return replace(base, **changes)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """As many rows of either label, all different."""
    path = tmp_path / "rows" / "rows.jsonl"
    path.parent.mkdir()
    lines = [
        {"text": f"A film, number {number}.", "label": ("negative", "positive")[number % 2]}
        for number in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
async def checked(
    rows: Path,
    model_folder: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> Checking:
    """Checks a worker in a run; returns the outcome and sentence of each check by its name.

    `offers`: the runs, by their names, of a coordinator that hosts several.
    """

    async def check(
        run: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
        error: Exception | None = None,
        offers: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> dict[str, tuple[str, str]]:
        async def get_run(_: CoordinatorClient, run_id: str) -> RunDescription:
            if error is not None:
                raise error
            if offers is None:
                return described(tiny_genesis(**(run or {})), **(about or {}))
            if run_id not in offers:
                raise WrongRunError("Which run: several are going on.")
            return described(tiny_genesis(run_id=run_id, **offers[run_id]))

        async def offered_runs(*_: Any) -> wire.OfferRunsResponse:
            if offers is None:
                raise VersionError("It offers no runs.")
            return wire.OfferRunsResponse(
                offers=[wire.RunOffer(run_id=run_id) for run_id in offers], more_may_come=True
            )

        monkeypatch.setattr(CoordinatorClient, "get_run", get_run)
        monkeypatch.setattr(CoordinatorClient, "offered_runs", offered_runs)
        values: dict[str, Any] = {
            "name": "w1",
            "data": rows,
            "model": str(model_folder),
            "threads": 1,
        }
        report = Report("test")
        await preflight(WorkerSettings(**(values | settings)), report)
        return {
            f"{check.section}: {check.name}" if check.section else check.name: (
                str(check.outcome),
                check.said,
            )
            for check in report.checks
        }

    return check


async def test_a_sound_worker_is_told_what_a_run_costs(checked: Checking) -> None:
    found = await checked(heldout=None)
    assert {outcome for outcome, _ in found.values()} == {"ok"}
    assert list(found) == [
        "paths", "disk", "coordinator", "clock", "policy", "labels", "repeated", "model", "base",
        "tokens", "measurement", "memory",
    ]  # fmt: skip
    assert "the 6 rounds that are left" in found["measurement"][1]


@pytest.mark.parametrize("missing", ["data", "adapter"])
async def test_a_wrong_path_leaves_what_does_not_need_it(
    checked: Checking, tmp_path: Path, missing: str
) -> None:
    found = await checked(**{missing: tmp_path / "gone"})
    assert found["paths"][0] == "failure"
    assert str(tmp_path / "gone") in found["paths"][1]
    assert found["coordinator"][0] == "ok"
    assert "model" not in found


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UnavailableError("Nobody is there; start it."), "failure"),
        (StartingError("It loads the base."), "warning"),
    ],
)
async def test_a_coordinator_that_does_not_answer(
    checked: Checking, error: Exception, outcome: str
) -> None:
    found = await checked(error=error)
    assert found["coordinator"][0] == outcome
    assert str(error) in found["coordinator"][1]
    assert list(found)[-1] == "coordinator"


async def test_a_clock_and_a_key_of_another_coordinator(checked: Checking) -> None:
    yesterday = time.time_ns() // 1_000_000 - 86_400_000
    about = {"unix_ms": yesterday, "checkpoint_key": b"k" * 32}
    found = await checked(about=about, checkpoint_key="ab" * 32)
    assert found["clock"][0] == found["key"][0] == "failure"
    assert "24.0 h ahead of the coordinator's" in found["clock"][1]
    assert f"signs with key {(b'k' * 32).hex()}, not with abab" in found["key"][1]


async def test_a_run_that_the_policy_refuses(checked: Checking) -> None:
    found = await checked(policy={"rounds_max": 5})
    assert found["policy"][0] == "failure"
    assert "raise policy.rounds_max" in found["policy"][1]
    assert "model" not in found


async def test_each_offered_run_is_a_section_and_those_that_the_policy_refuses_are_told(
    checked: Checking,
) -> None:
    offers: dict[str, dict[str, Any]] = {"long": {"rounds": 11}, "a": {}, "b": {"eps": 1e38}}
    found = await checked(offers=offers, policy={"rounds_max": 10})
    assert found["run long: policy"][0] == "warning"
    assert "raise policy.rounds_max" in found["run long: policy"][1]
    assert "run long: model" not in found
    assert found["run a: policy"] == ("ok", "this worker's settings allow run a")
    assert found["run a: measurement"][0] == "ok"
    assert found["run b: measurement"][0] == "failure"
    assert "all runs: policy" not in found


async def test_a_worker_whose_policy_refuses_all_runs_fails(checked: Checking) -> None:
    found = await checked(offers={"long": {"rounds": 11}}, policy={"rounds_max": 10})
    assert found["all runs: policy"][0] == "failure"


async def test_a_run_that_is_named_is_checked_alone(checked: Checking) -> None:
    offers: dict[str, dict[str, Any]] = {"long": {"rounds": 11}, "a": {}}
    found = await checked(offers=offers, policy={"rounds_max": 10}, run_id="long")
    assert found["policy"][0] == "failure"
    found = await checked(offers=offers, policy={"rounds_max": 10}, run_id="c")
    assert found["coordinator"][0] == "failure"


async def test_a_coordinator_without_a_run_yet_is_no_failure(checked: Checking) -> None:
    found = await checked(offers={})
    assert found["coordinator"][0] == "warning"
    assert "offers no run now" in found["coordinator"][1]


async def test_what_one_data_set_may_give_away_is_checked_with_its_run(
    checked: Checking, rows: Path, tmp_path: Path
) -> None:
    reviews = {"path": rows, "privacy_epsilon": 2.0, "privacy_clip": 1.0}
    data = {"reviews": {**reviews, "privacy_ledger": tmp_path / "ledger"}}
    found = await checked(offers={"a": {"data_set": "reviews"}}, data=data)
    assert found["run a: privacy"] == ("ok", "the rows have given away epsilon 0.00 of 2")


def _rename_the_text(rows: Path, heldout: Path) -> None:
    renamed = rows.read_text().replace('"text"', '"body"')
    rows.write_text(renamed)
    heldout.write_text(renamed.replace("film", "book"))


async def test_held_out_rows_are_read_by_the_columns_of_the_data(
    checked: Checking, rows: Path, tmp_path: Path
) -> None:
    heldout = tmp_path / "heldout.jsonl"
    _rename_the_text(rows, heldout)
    found = await checked(heldout=heldout, columns={"text": "body"})
    assert {outcome for outcome, _ in found.values()} == {"ok"}


def write(path: Path, *pairs: tuple[str, str]) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    path.write_text("\n".join(lines))


async def test_rows_that_do_not_suit_the_run(checked: Checking, rows: Path) -> None:
    write(rows, ("a", "positive"), (" ", "negative"))
    found = await checked()
    assert found["rows"] == (
        "failure",
        f"Row 2 of {rows} has an empty text; fill it in or remove the row.",
    )
    assert "model" not in found
    write(rows, ("a", "positive"), ("b", "odd"))
    found = await checked()
    assert found["labels"][0] == "failure"
    assert "model" not in found, "the model would be loaded in vain"


async def test_held_out_rows_that_are_trained_on(checked: Checking, rows: Path) -> None:
    found = await checked(heldout=rows)
    assert found["repeated"][0] == "warning"
    assert "12 held-out rows with the text" in found["repeated"][1]
    assert found["measurement"][0] == "ok"


async def test_a_model_that_is_not_the_runs(checked: Checking, tmp_path: Path) -> None:
    save_model(tmp_path / "other", change=0.5)
    found = await checked(model=str(tmp_path / "other"))
    assert found["base"][0] == "failure"
    assert "base weights" in found["base"][1]
    found = await checked(model=str(tmp_path / "gone"))
    assert found["model"][0] == "failure"
    assert "There is no model folder" in found["model"][1]


async def test_a_model_that_would_have_to_be_downloaded(
    checked: Checking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_preflight, "model_is_here", lambda _name: False)
    found = await checked(model="somebody/model")
    assert found["model"][0] == "warning"
    assert "the worker downloads it when it starts" in found["model"][1]


@pytest.mark.parametrize(
    ("seconds", "outcome", "said"),
    [
        (0.2, "failure", "so ask for a larger deadline_ms"),
        (0.07, "warning", "which leaves little"),
    ],
)
async def test_a_measurement_that_takes_longer_than_a_round(
    checked: Checking, monkeypatch: pytest.MonkeyPatch, seconds: float, outcome: str, said: str
) -> None:
    clock_s = [0.0]

    def monotonic() -> float:
        clock_s[0] += seconds
        return clock_s[0]

    monkeypatch.setattr(time, "monotonic", monotonic)
    found = await checked({"deadline_ms": 100})
    assert found["measurement"][0] == outcome
    assert said in found["measurement"][1]


async def test_a_measurement_that_fails(checked: Checking) -> None:
    found = await checked({"eps": 1e38})
    assert found["measurement"][0] == "failure"
    assert "use a smaller eps" in found["measurement"][1]


async def test_rows_that_have_given_away_what_they_may(
    checked: Checking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmezo_core.zo.privacy import accounting

    ledger = tmp_path / "ledger"
    budget = {"privacy_epsilon": 2.0, "privacy_clip": 1.0, "privacy_ledger": ledger}
    found = await checked(**budget)
    assert found["privacy"] == ("ok", "the rows have given away epsilon 0.00 of 2")
    assert not ledger.exists(), "a measurement was written down"
    monkeypatch.setattr(accounting, "epsilon_of", lambda *_: 2.5)
    found = await checked(**budget)
    assert found["privacy"][0] == "failure"
    assert "use other rows, or raise privacy_epsilon" in found["privacy"][1]


async def test_who_has_not_joined_yet(checked: Checking, tmp_path: Path) -> None:
    found = await checked(name="", state=tmp_path / "nobody")
    assert found["identity"][0] == "failure"
    assert "holds no identity" in found["identity"][1]
    assert "coordinator" not in found
    assert not (tmp_path / "nobody").exists()


async def test_an_identity_that_expired(
    checked: Checking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_state(tmp_path / "state", [], None)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 11 * 365 * 86_400)
    found = await checked(name="", state=tmp_path / "state")
    assert found["identity"][0] == "failure"
    assert "set" in found["identity"][1]


async def test_a_join_string_without_a_coordinator(checked: Checking, tmp_path: Path) -> None:
    found = await checked(name="", join="fedmezo1:cut-off")
    assert found["identity"][0] == "failure"
    assert "join string" in found["identity"][1]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
async def test_it_joins_nothing_and_changes_nothing(
    programs: Programs, tmp_path: Path, model_folder: Path, rows: Path
) -> None:
    """The command beside a real coordinator, with all the files that a worker would write."""
    coordinator, address = await programs.coordinator(
        tmp_path / "journal.db", run_values(workers_min=1, quorum=1), "--model", model_folder
    )
    own = tmp_path / "own"
    own.mkdir()
    heldout = write_rows(own / "heldout.jsonl")
    before = contents(own), contents(rows.parent)
    checking = programs.start(
        "fedmezo_worker",
        *("preflight", "--coordinator", address, "--name", "w1", "--data", rows),
        *("--model", model_folder, "--threads", "1", "--format", "json", "--heldout", heldout),
        *("--journal-copy", own / "copy.db", "--evaluations", own / "evaluations.jsonl"),
    )
    assert await checking.wait() == 0
    assert (contents(own), contents(rows.parent)) == before
    report = json.loads(checking.said)
    assert report["failures"] == 0
    assert [check["check"] for check in report["checks"]].count("disk") == 3
    assert "A film, number" not in checking.said, "a private row is in the JSON"
    assert "w1" not in coordinator.said
