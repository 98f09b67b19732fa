"""`fedmezo conformance` as a person calls it: arguments, reports and exit statuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedmezo_coordinator.conformance.coordinator_battery import CoordinatorBattery
from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_core.errors import ConfigError, FedMezoError
from tests.integration.support.harness import config_of, genesis_of, served, write_genesis


def called(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["conformance", *map(str, arguments)])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db"
    write_genesis(path, genesis_of(config_of(rounds=60)))
    return path


async def test_a_coordinator_that_conforms_is_status_0(tmp_path: Path) -> None:
    config = config_of(rounds=8, workers_min=2, quorum=2)
    async with served(tmp_path / "run.db", genesis_of(config)) as coordinator:
        result = await asyncio.to_thread(
            called, "coordinator", coordinator.address, "--format", "json"
        )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["subject"] == "coordinator"
    assert report["conforms"] is True
    assert {check["outcome"] for check in report["checks"]} == {"passed", "skipped"}


def test_each_check_is_printed_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A battery that takes long, or is ended, has shown what it found."""

    async def interrupted(battery: CoordinatorBattery) -> None:
        battery._report.expect("describes its run", 5, True)
        battery._report.skip("signs each commit, if it has a key", 5, "it has no key")
        battery._report.expect("refuses a bad name", 14, False, "welcome came")
        raise KeyboardInterrupt

    monkeypatch.setattr(CoordinatorBattery, "run", interrupted)
    result = called("coordinator", "127.0.0.1:9")
    assert result.stdout.splitlines() == [
        "passed   section  5  describes its run",
        "skipped  section  5  signs each commit, if it has a key: it has no key",
        "failed   section 14  refuses a bad name: welcome came",
    ]
    assert called("coordinator", "127.0.0.1:9", "--format", "json").stdout == ""


def test_a_coordinator_that_is_not_there_is_status_1() -> None:
    result = called("coordinator", "127.0.0.1:9", "--patience-s", "0.5")
    assert result.exit_code == 1
    assert "The coordinator does not conform: 0 passed, 1 failed, 0 skipped." in result.stdout


def test_a_worker_that_does_not_speak_is_status_1(journal: Path) -> None:
    result = called(
        "worker", "--journal", journal, "--start", "true", "--patience-s", "1", "--format", "json"
    )
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    failed = {check["name"] for check in report["checks"] if check["outcome"] == "failed"}
    assert "opens a session with hello" in failed
    assert not report["conforms"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("coordinator", "http://host:1"), "http://host:1"),
        (("worker",), "Give --config or --journal"),
        (("worker", "--journal", "{journal}", "--config", "x.toml"), "one of the two"),
        (("worker", "--journal", "{journal}", "--data", "x.jsonl"), "--data needs --config"),
        (("worker", "--journal", "{journal}", "--start", "/no/such/program"), "check --start"),
        (("worker", "--journal", "{journal}", "--start", ""), "check --start"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], words: str, journal: Path) -> None:
    result = called(*(argument.format(journal=journal) for argument in arguments))
    assert isinstance(result.exception, FedMezoError)
    assert words in str(result.exception)


def test_a_contract_without_sequences_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.db"
    write_genesis(path, genesis_of(config_of(rounds=6)))
    result = called("worker", "--journal", path)
    assert isinstance(result.exception, ConfigError)
    assert "set rounds = 40 or more" in str(result.exception)
