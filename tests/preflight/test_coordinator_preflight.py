"""`fedmezo-coordinator preflight`: each thing that can keep a coordinator from serving its run."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmezo.preflight.check_report import Report
from fedmezo_coordinator.admission.state_folder import make_state
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.coordinator_command import main
from fedmezo_coordinator.programs.preflight import coordinator_preflight
from fedmezo_coordinator.programs.preflight.coordinator_preflight import (
    CoordinatorPreflightSettings,
    preflight,
)
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_core.errors import ModelError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from tests.integration.support.harness import free_port, run_values, toml_of
from tests.integration.support.parties import write_rows
from tests.preflight.test_worker_preflight import contents

Checking = Callable[..., Any]


def balanced(path: Path, count: int = 12) -> Path:
    """As many rows of either label, all different."""
    labels = ("negative", "positive")
    rows = [{"text": f"A film, number {n}.", "label": labels[n % 2]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def checked(
    tmp_path: Path,
    model_folder: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> Checking:
    """Checks settings, without a child process; returns what was found by the checks' names."""

    async def check(
        run: dict[str, Any] | None = None, described: Any = None, **settings: Any
    ) -> dict[str, tuple[str, str]]:
        async def describe(asked: CoordinatorSettings, config: Any) -> Genesis:
            if not asked.model:
                return await describe_base(asked, config)
            if isinstance(described, Exception):
                raise described
            return replace(tiny_genesis(), config=config, **(described or {}))

        monkeypatch.setattr(coordinator_preflight, "describe_base", describe)
        values = {
            "listen": f"127.0.0.1:{free_port()}",
            "journal": str(tmp_path / "journal.db"),
            "model": str(model_folder),
            "heldout": balanced(tmp_path / "heldout.jsonl"),
            "run": run_values(**(run or {})),
        }
        report = Report("test")
        await preflight(CoordinatorSettings.model_validate(values | settings), report)
        return {check.name: (str(check.outcome), check.said) for check in report.checks}

    return check


async def test_sound_settings(checked: Checking, tmp_path: Path) -> None:
    found = await checked()
    assert {outcome for outcome, _ in found.values()} == {"ok"}
    assert list(found) == [
        "port", "journal", "contract", "disk", "labels", "repeated", "model",
        "workers' model", "memory",
    ]  # fmt: skip
    assert [path.name for path in contents(tmp_path)] == ["heldout.jsonl"]


@pytest.mark.slow
async def test_it_fits_an_adapter_and_leaves_none_behind(
    tmp_path: Path, model_folder: Path, data_files: list[Path]
) -> None:
    lora = {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True}
    values = {
        "listen": f"127.0.0.1:{free_port()}",
        "journal": str(tmp_path / "journal.db"),
        "model": str(model_folder),
        "adapter_rows": data_files[3],
        "run": run_values(lora=lora),
    }
    report = Report("test")
    await preflight(CoordinatorSettings.model_validate(values), report)
    assert not report.failures
    names = {check.name for check in report.checks}
    assert "model" in names
    assert "labels" not in names, "the fit reads none"
    assert any(check.said.startswith("adapter_rows: ") for check in report.checks)
    assert not contents(tmp_path)


async def test_an_adapter_whose_factors_are_fitted_to_nothing(checked: Checking) -> None:
    lora = {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True, "output_rank": 2}
    found = await checked(run={"lora": lora})
    assert found["contract"][0] == "warning"
    assert "two factors, which stay random; set adapter_rows" in found["contract"][1]


async def test_with_many_runs_it_looks_at_what_they_share(
    checked: Checking, tmp_path: Path
) -> None:
    report = Report("test")
    settings = {"listen": f"127.0.0.1:{free_port()}", "runs": tmp_path / "runs"}
    await preflight(
        CoordinatorPreflightSettings.model_validate(settings | {"strict": True}), report
    )
    assert [check.name for check in report.checks] == ["port", "disk"]
    assert not contents(tmp_path)


async def test_workers_need_no_copy_of_a_model_on_the_hub(
    checked: Checking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_preflight, "model_is_here", lambda _name: True)
    found = await checked(model="gpt2")
    assert found["model"][0] == "ok"
    assert "workers' model" not in found


async def test_a_port_that_is_taken(checked: Checking) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = await checked(listen=f"127.0.0.1:{other.getsockname()[1]}")
    assert found["port"][0] == "failure"
    assert found["model"][0] == "ok"


async def test_an_address_for_everybody(checked: Checking) -> None:
    found = await checked(listen="0.0.0.0:0")
    assert found["port"][0] == "failure"
    assert "lets other machines connect" in found["port"][1]


async def test_a_contract_that_is_not_allowed(checked: Checking) -> None:
    found = await checked({"quorum": 100})
    assert found["contract"][0] == "failure"
    assert "quorum 100 can never be met" in found["contract"][1]
    assert "model" not in found
    found = await checked({"preset": "none"})
    assert "There is no preset 'none'" in found["contract"][1]


async def test_a_run_whose_loss_nobody_sees(checked: Checking) -> None:
    found = await checked(heldout=None)
    assert found["contract"][0] == found["rows"][0] == "warning"
    assert "set model and heldout, or report_losses" in found["contract"][1]
    assert "set heldout to rows that no worker trains on" in found["rows"][1]


async def test_held_out_rows_that_cannot_be_read(checked: Checking, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    found = await checked(heldout=tmp_path / "bad.jsonl")
    assert found["rows"][0] == "failure"
    assert "has no column label" in found["rows"][1]
    assert "model" not in found


async def test_a_model_that_cannot_be_loaded(
    checked: Checking, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await checked(described=ModelError("It is damaged; get it again."))
    assert found["model"] == ("failure", "It is damaged; get it again.")
    found = await checked(model="")
    assert found["model"][0] == "failure"
    assert "model is missing" in found["model"][1]
    monkeypatch.setattr(coordinator_preflight, "model_is_here", lambda _name: False)
    found = await checked(model="somebody/model")
    assert found["model"][0] == "warning"
    assert "downloads it when it starts" in found["model"][1]


def begun(path: Path, genesis: Genesis) -> None:
    store = SqliteStore(path)
    Journal(store).append(encode_records([genesis]))
    store.close()


async def test_a_journal_of_a_run_that_goes_on(
    checked: Checking, tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    begun(tmp_path / "journal.db", tiny_genesis())
    balanced(tmp_path / "heldout.jsonl")
    before = contents(tmp_path)
    found = await checked()
    assert {path: content for path, (_, content) in contents(tmp_path).items()} == {
        path: content for path, (_, content) in before.items()
    }
    assert found["journal"][0] == "ok"
    assert "run tiny-run goes on after round 0 of 6" in found["journal"][1]
    found = await checked({"rounds": 7})
    assert found["contract"][0] == "failure"
    assert "belongs to a run with rounds = 6" in found["contract"][1]
    found = await checked(described={"base_digest": b"x" * 32})
    assert found["base"][0] == "failure"
    assert "The base weights loaded here differ from the journal's run" in found["base"][1]


async def test_a_journal_that_cannot_be_read(checked: Checking, tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database at all" * 100)
    found = await checked()
    assert found["journal"][0] == "failure"
    assert "model" not in found


async def test_a_journal_that_is_lost_but_left_its_key(checked: Checking, tmp_path: Path) -> None:
    (tmp_path / "journal.db.key").write_text("a key")
    found = await checked()
    assert found["journal"][0] == "failure"
    assert "so there was a run" in found["journal"][1]


async def test_a_journal_that_a_coordinator_may_have(
    checked: Checking, tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    begun(tmp_path / "journal.db", tiny_genesis())
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = await checked(listen=f"127.0.0.1:{other.getsockname()[1]}")
    assert found["journal"][0] == "warning"
    assert "the coordinator that has it may be running" in found["journal"][1]


async def test_a_state_folder_and_its_certificate(
    checked: Checking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await checked(state=tmp_path / "state")
    assert found["certificate"][0] == "failure"
    assert "is no state folder; make one with" in found["certificate"][1]
    make_state(tmp_path / "state", [], None)
    found = await checked(state=tmp_path / "state")
    assert found["certificate"][0] == "ok"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 10 * 86_400)
    found = await checked(state=tmp_path / "state")
    assert found["certificate"][0] == "failure"
    assert "set the clock if it is wrong" in found["certificate"][1]


async def test_a_certificate_that_cannot_be_served(checked: Checking, tmp_path: Path) -> None:
    make_state(tmp_path / "state", [], None)
    files = {"tls_cert": tmp_path / "state/ca.pem", "tls_key": tmp_path / "state/server.key"}
    found = await checked(**files)
    assert found["certificate"][0] == "failure"
    assert "cannot be served with" in found["certificate"][1]


async def test_snapshots_need_room(checked: Checking, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = await checked(snapshot_every_rounds=2, snapshots=tmp_path / "file")
    assert found["disk"][0] == "failure"


@pytest.mark.slow
def test_the_command_loads_the_base_and_probes(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the child process, on a contract that names a preset and another family of models."""
    run = {
        "run_id": "r",
        "preset": "classification",
        "lora": {"rank": 2},
        "batch_size": 4,
        "rounds": 60,
        "task": run_values()["task"],
    }
    (tmp_path / "c.toml").write_text(toml_of({"model": str(model_folder), "run": run}))
    flags = [
        "preflight", f"--config={tmp_path / 'c.toml'}", f"--journal={tmp_path / 'j.db'}",
        f"--listen=127.0.0.1:{free_port()}", "--format=json",
        f"--heldout={write_rows(tmp_path / 'heldout.jsonl', count=10)}",
        f"--probe-rows={balanced(tmp_path / 'probe.jsonl', 24)}",
    ]  # fmt: skip
    assert main(flags) == 0
    report = json.loads(capsys.readouterr().out)
    values = {check["check"]: check["values"] for check in report["checks"]}
    assert values["contract"]["preset"] == "classification"
    assert values["model"]["target_modules"] == ["transformer.h.0.mlp.c_fc"]
    [said] = [c["said"] for c in report["checks"] if c["check"] == "workers' model"]
    assert f'"{model_folder.name}" = "FOLDER" under [models]' in said
    assert values["probe"]["learning_rate"] > 0
    assert values["memory"]["peak_bytes"] > 1 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c.toml",
        "heldout.jsonl",
        "probe.jsonl",
    ]
