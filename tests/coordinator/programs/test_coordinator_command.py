"""The command lines: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import coordinator_command as cli
from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import ConfigError, FedMezoError, WrongRunError
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    Programs,
    config_of,
    genesis_of,
    records_of,
    run_values,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=2, workers_min=1, quorum=1, local_steps=1))


@pytest.fixture
async def journal(tmp_path: Path) -> Path:
    """The journal of a finished run."""
    path = tmp_path / "journal.db"
    async with served(path, GENESIS) as at, scripted_workers(at.address, GENESIS, "w1") as [hand]:
        await hand.open()
        await hand.work_to_the_end()
    return path


def names_in(folder: Path, pattern: str) -> list[str]:
    """The names of the files of a folder that match."""
    return sorted(path.name for path in folder.glob(pattern))


def fedmezo(*arguments: str) -> str:
    """Run the client's command in this process; what it printed."""
    result = CliRunner().invoke(client_cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_prints_one_line_a_record(journal: Path) -> None:
    lines = fedmezo("journal", "inspect", str(journal)).splitlines()
    kinds = [line.split()[2] for line in lines]
    assert kinds == ["genesis", "started", *["opened", "answered", "committed"] * 2]
    assert "run tiny-run on tiny" in lines[0]
    tail = fedmezo("journal", "inspect", str(journal), "--from-seqno", "6").splitlines()
    assert tail == lines[6:]
    with pytest.raises(ConfigError, match="--from-seqno 8 is beyond the journal's last record, 7"):
        fedmezo("journal", "inspect", str(journal), "--from-seqno", "8")
    with pytest.raises(WrongRunError, match="tiny-run"):
        fedmezo("journal", "inspect", str(journal), "--run-id", "nosuch")
    with pytest.raises(ConfigError, match="The journal's name is empty"):
        fedmezo("journal", "inspect", "")


def test_a_journal_in_the_home_folder(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(journal.parent))
    assert fedmezo("journal", "inspect", f"~/{journal.name}") == fedmezo(
        "journal", "inspect", str(journal)
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator", "http://host:7465"], "without a scheme or a path: host:7465"),
        (["--coordinator", "::1:7465"], r"in brackets: \[::1\]:7465"),
        (["--tls-ca", "~nobody-here/ca.pem"], "nobody of that name"),
    ],
)
@pytest.mark.parametrize("command", ["status", "watch", "journal inspect", "journal verify"])
def test_a_wrong_address_is_refused_at_once(command: str, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(client_cli.app, [*command.split(), *flags], catch_exceptions=False)


def test_inspect_prints_json_for_programs(journal: Path) -> None:
    lines = fedmezo("journal", "inspect", str(journal), "--json").splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["seqno"] for value in values] == list(range(8))
    assert values[0]["config"]["run_id"] == "tiny-run"
    assert values[3]["projected_grads"] == [0.5]
    assert values[4]["kind"] == "committed"
    assert [run["coefficients"] for run in values[4]["runs"]] == [[pytest.approx(-0.0005)]]


def test_verify_prints_the_head(journal: Path) -> None:
    said = fedmezo("journal", "verify", str(journal))
    assert "sound: 8 records, run tiny-run, 1 coordinator start, 2 rounds committed" in said
    assert said.endswith(
        "; no signed heads in it, so the coordinator's signature was not checked\n"
    )


async def test_excluding_a_name_that_no_worker_has_says_so(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()

        def exclude(name: str) -> str:
            flags = ("--reason", "noise", "--coordinator", at.address)
            return fedmezo("exclude", name, *flags)

        assert "lets it take part again" in await asyncio.to_thread(exclude, "w1")
        said = await asyncio.to_thread(exclude, "nobody")
        assert "nobody is excluded, but no worker of that name has joined this run" in said


def test_looking_leaves_the_journal_as_it_is(journal: Path) -> None:
    before = records_of(journal)
    fedmezo("journal", "verify", str(journal))
    assert records_of(journal) == before


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_journal_that_is_not_there(tmp_path: Path, command: str) -> None:
    with pytest.raises(FedMezoError, match=r"There is no journal at .*gone.db; check the path"):
        fedmezo("journal", command, str(tmp_path / "gone.db"))


def test_an_export_after_a_round_that_is_not_committed(journal: Path, tmp_path: Path) -> None:
    with pytest.raises(FedMezoError, match=r"--round 3 is not committed yet, .* ends at round 2"):
        fedmezo("export", str(tmp_path / "out"), "--journal", str(journal), "--round", "3")


def test_an_empty_journal_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(FedMezoError, match="The journal is empty: no run has begun in it"):
        fedmezo("journal", "verify", str(tmp_path / "empty.db"))


async def test_status_and_watch_of_a_running_coordinator(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    try:
        async with (
            served(tmp_path / "journal.db", GENESIS) as at,
            scripted_workers(at.address, GENESIS, "w1") as [hand],
        ):
            where = ("--coordinator", at.address)
            watching = programs.start(
                "fedmezo_coordinator.programs.fedmezo_command", "watch", *where, "--every-s", "0.1"
            )
            asked = programs.start(
                "fedmezo_coordinator.programs.fedmezo_command", "status", *where, "--json"
            )
            assert await asked.wait() == 0
            values = json.loads(asked.said)
            assert values["config"]["run_id"] == "tiny-run"
            assert values["head"] == at.daemon.status("").head.hex()
            await hand.open()
            await hand.work_to_the_end()
            assert await watching.wait() == 0
            assert watching.said.splitlines()[-1].startswith("round 2/2; ")
        assert watching.said.rstrip().endswith("; finished")
    finally:
        programs.end()


async def test_nobody_to_ask(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    try:
        asked = programs.start(
            "fedmezo_coordinator.programs.fedmezo_command",
            "status",
            FEDMEZO_COORDINATOR="127.0.0.1:9",
        )
        assert await asked.wait() == 1
        assert asked.said.startswith("fedmezo: No coordinator answers at 127.0.0.1:9")
        assert asked.said.count("\n") == 1
    finally:
        programs.end()


async def test_status_fails_if_the_parties_hold_different_weights(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    try:
        async with (
            served(tmp_path / "journal.db", GENESIS) as at,
            scripted_workers(at.address, GENESIS, "w1", "w2") as both,
        ):
            for hand in both:
                await hand.open()
                digest = hand.name.encode() * 16
                report = wire.WeightsReport(round=0, weights_digest=digest)
                await hand.send(weights_report=report)

            async def reported() -> bool:
                return len(at.daemon.status("").digests) == 2

            await until(reported, "both digests")
            asked = programs.start(
                "fedmezo_coordinator.programs.fedmezo_command",
                "status",
                "--coordinator",
                at.address,
            )
            assert await asked.wait() == 1
            assert "DIFFER" in asked.said
            assert "fedmezo: Not all parties hold the same weights" in asked.said
    finally:
        programs.end()


@pytest.mark.parametrize("flags", [["--help"], ["journal", "--help"], ["export", "--help"]])
def test_help_ends_with_status_0(flags: list[str]) -> None:
    assert "Usage" in fedmezo(*flags)


def test_the_coordinators_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert "--evaluate-every-rounds" in capsys.readouterr().out


def test_a_bad_setting_ends_the_coordinator_with_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--evaluate-every-rounds", "0"]) == 2
    assert capsys.readouterr().err.startswith("fedmezo-coordinator: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--run", '{"run_id": "r"}'], "task is missing"),
        (["--run", json.dumps(run_values())], "--model"),
        (["--run", '{"rounds": 0}'], "the [run] settings"),
    ],
)
async def test_a_start_that_fails_leaves_no_journal(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    journal = tmp_path / "journal.db"
    programs = Programs(tmp_path)
    try:
        for existed in (False, True):
            if existed:
                SqliteStore(journal).close()
            program = programs.start(
                *("fedmezo_coordinator", "--listen", "127.0.0.1:0", "--journal", journal), *flags
            )
            assert await program.wait() == 2
            assert said in program.said
            # A journal that was there before stays.
            assert names_in(tmp_path, "journal*") == ["journal.db"] * existed
    finally:
        programs.end()


def test_the_version() -> None:
    assert fedmezo("--version").startswith("fedmezo ")
    assert "--version" in fedmezo("--help")
