"""`--format json` prints an object on each line, in every command that prints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from tests.coordinator.programs.test_rebuilding import records
from tests.coordinator.runs.hosting_runs import hosted
from tests.integration.support.harness import (
    config_of,
    free_port,
    genesis_of,
    scripted_workers,
    served,
)


def commands(group: Any, name: str = "fedmezo") -> Iterator[tuple[str, click.Command]]:
    for own, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {own}")
        else:
            yield f"{name} {own}", command


COMMANDS = dict(commands(typer.main.get_command(client_cli.app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_option(name: str) -> None:
    [option] = [one for one in COMMANDS[name].params if "--format" in one.opts]
    assert "json" in getattr(option.type, "choices", ()), name


def lines(*arguments: str | Path) -> list[dict[str, Any]]:
    flags = [*map(str, arguments), "--format", "json"]
    found = CliRunner().invoke(client_cli.app, flags, catch_exceptions=False)
    assert found.exit_code == 0
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    written = Journal(SqliteStore(tmp_path / "journal.db"))
    written.append(encode_records(records()))
    written.close()
    return tmp_path / "journal.db"


def test_verify(journal: Path) -> None:
    [found] = lines("journal", "verify", journal, "--signatures")
    assert (found["round"], found["epoch"], found["signed_round"]) == (6, 1, None)
    assert found["answers"] == {"signed": 0, "unsigned": 6, "unchecked": 0, "workers": []}
    text = CliRunner().invoke(client_cli.app, ["journal", "verify", str(journal)]).output
    assert found["head"] in text.replace("\n", "")


def test_restore(journal: Path, tmp_path: Path) -> None:
    target = tmp_path / "restored.db"
    [found] = lines("journal", "restore", journal, target)
    assert (found["journal"], found["snapshots"]) == (str(target), None)
    assert lines("journal", "verify", target)[0]["head"] == found["head"]


def test_the_older_flag_means_the_same(journal: Path) -> None:
    found = CliRunner().invoke(client_cli.app, ["journal", "inspect", str(journal), "--json"])
    assert [json.loads(line) for line in found.output.splitlines()] == lines(
        "journal", "inspect", journal
    )


def test_split(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 10)
    [found] = lines(
        "split", rows, "--out", tmp_path / "out", "--workers", "2", "--by", "label",
        "--splitter", "dirichlet",
    )  # fmt: skip
    assert sum(one["rows"] for one in found["files"]) == 20
    assert sum(one["classes"].get("x", 0) for one in found["files"]) == 10
    assert all((tmp_path / "out" / one["file"]).is_file() for one in found["files"])


async def test_watch_prints_a_status_for_each_change(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(rounds=2, workers_min=1, quorum=1, local_steps=1))
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        scripted_workers(at.address, genesis, "w1") as [scripted],
    ):
        await scripted.open()
        await scripted.work_to_the_end()
        found = await asyncio.to_thread(lines, "watch", "--coordinator", at.address)
        [status] = await asyncio.to_thread(lines, "status", "--coordinator", at.address)
    assert [one["round"] for one in found] == [2]
    assert (found[0]["phase"], status["phase"]) == ("finished", "finished")
    assert found[0].keys() == status.keys()


async def test_health_and_the_page_s_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"127.0.0.1:{free_port()}"
    async with hosted(tmp_path / "runs", monkeypatch, page=page) as at:
        told = [
            await asyncio.to_thread(lines, *command.split(), "--coordinator", at.address)
            for command in ("health", "health --service fedmezo.v1.RunService", "page")
        ]
    assert told == [
        [{"address": at.address, "service": "", "served": True}],
        [{"address": at.address, "service": "fedmezo.v1.RunService", "served": True}],
        [{"link": f"http://{page}/"}],
    ]
