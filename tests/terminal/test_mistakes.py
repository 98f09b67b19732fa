"""Each mistake at a command of `fedmezo` is one sentence and a status, in every state of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from fedmezo_coordinator.programs import fedmezo_command
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.coordinator.programs.test_formats import COMMANDS
from tests.coordinator.runs.hosting_runs import hosted, settings_toml
from tests.integration.support.harness import free_port


class Complaints:
    """Runs commands in this process, and takes the one line that each says of a mistake."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str]:
        """The exit status, and the sentence without the program's name; empty if there is none."""
        self._capsys.readouterr()
        try:
            status = fedmezo_command.main([str(one) for one in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        lines = self._capsys.readouterr().err.splitlines()
        assert len(lines) <= 1, lines
        assert all(line.startswith("fedmezo: ") for line in lines)
        return status, "".join(lines).removeprefix("fedmezo: ")

    async def beside(self, *arguments: str | Path) -> tuple[int, str]:
        """The same while this process also serves."""
        return await asyncio.to_thread(self, *arguments)


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaints:
    return Complaints(capsys)


def words_of(name: str) -> Sequence[str]:
    return name.split()[1:]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option(complaint: Complaints, name: str) -> None:
    status, said = complaint(*words_of(name), "--formt", "json")
    assert status == 2
    assert said.startswith("No such option")
    assert said.endswith(f"ee {name} --help.")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_that_is_not_allowed(complaint: Complaints, name: str) -> None:
    status, said = complaint(*words_of(name), "--format", "yaml")
    assert status == 2
    assert "'yaml' is not one of" in said
    assert said.endswith(f"; see {name} --help.")


def floats_of() -> list[tuple[str, str]]:
    """Each option of a command whose value is a number that need not be whole."""
    found = []
    for name in COMMANDS:
        command: Any = get_command(fedmezo_command.app)
        for word in words_of(name):
            command = command.commands[word]
        found += [
            (name, option.opts[0])
            for option in command.params
            if isinstance(option.type, click.types.FloatParamType)
        ]
    return found


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("name", "option"), floats_of())
def test_a_number_that_is_not_finite(
    complaint: Complaints, name: str, option: str, value: str
) -> None:
    status, said = complaint(*words_of(name), option, value)
    assert status == 2
    assert f"{value} is not allowed" in said or "is not in the range" in said, said


def test_what_is_no_command(complaint: Complaints) -> None:
    groups = ["", "run", "journal", "conformance", "token"]
    for group in groups:
        status, said = complaint(*group.split(), "lst")
        assert status == 2
        assert said.startswith("No such command 'lst'")


def test_help_is_shown_where_arguments_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ([], ["run"]):
        with pytest.raises(SystemExit) as ended:
            fedmezo_command.main(group)
        assert ended.value.code == 2
        shown = capsys.readouterr()
        assert "Usage: fedmezo" in shown.out + shown.err


CALLS = [
    ["status"],
    ["watch"],
    ["run", "list"],
    *(["run", order, "r1"] for order in ("status", "watch", "pause", "resume", "stop", "delete")),
    ["journal", "inspect"],
    ["journal", "verify"],
    ["exclude", "w1", "--reason", "x"],
    ["readmit", "w1"],
    ["page"],
    ["health"],
]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_nobody_answers(complaint: Complaints, call: list[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    said = (
        f"No coordinator answers at {address} (Connection refused); check the address, and that it "
        "is running."
    )
    assert complaint(*call, "--coordinator", address) == (1, said)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["journal", "verify", "gone.db"], 1, "There is no journal at gone.db"),
        (["journal", "verify", "."], 1, "There is no journal at ."),
        (["journal", "verify", "text"], 1, "text is not a journal"),
        (["journal", "restore", "gone.db", "new.db"], 1, "There is no journal at gone.db"),
        (["run", "create", "gone.toml"], 2, "gone.toml cannot be read (No such file"),
        (["run", "create", "."], 2, "The configuration file . cannot be read (Is a directory)"),
        (["run", "create", "half.toml"], 2, "half.toml is not valid TOML"),
        (["probe", "--config", "gone.toml", "--data", "text"], 2, "gone.toml cannot be read"),
        (["probe", "--config", "x", "--data", "gone"], 2, "no data file or folder gone"),
        (["evaluate", "gone", "--data", "text"], 2, "There is no folder gone"),
        (["evaluate", ".", "--data", "gone"], 2, "There is no data file or folder gone"),
        (["generate", "text", "hello"], 2, "There is no folder text"),
        (["split", "gone", "--out", "o", "--workers", "2"], 2, "no data file or folder gone"),
        (["split", "a.jsonl", "--out", "text", "--workers", "2"], 2, "text exists and is not"),
        (["split", "a.jsonl", "--out", "o", "--workers", "x"], 2, "'x' is not a valid integer"),
        (["rebuild", "gone", "--model", "m", "--out", "o"], 1, "There is no journal at gone"),
        (["privacy", "gone"], 1, "The privacy ledger gone cannot be read"),
        (["join", "nonsense"], 2, "A join string begins with fedmezo1:"),
        (["status", "--coordinator", "nonsense"], 2, "coordinator = 'nonsense' is not allowed"),
        (["status", "--tls-ca", "gone.pem", "--coordinator", "127.0.0.1:9"], 2, "gone.pem"),
        (["run", "pause"], 2, "Missing argument 'RUN'; see fedmezo run pause --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_not_there_or_something_else(
    complaint: Complaints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.toml").write_text("[run]\nrounds = ")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 20)
    (tmp_path / "text").write_text("no journal and no folder " * 400)
    found = complaint(*arguments)
    assert found[0] == status
    assert said in found[1]


# ---------------------------------------------------------------- orders in every state of a run


OF_A_RUN = [
    *(["run", order, "gone"] for order in ("status", "watch", "pause", "resume", "stop", "delete")),
    ["status", "--run-id", "gone"],
    ["watch", "--run-id", "gone"],
    ["journal", "inspect", "--run-id", "gone"],
    ["exclude", "w1", "--reason", "x", "--run-id", "gone"],
]


async def test_a_run_that_nobody_knows(
    complaint: Complaints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "There is no run 'gone' here: one is going on; `fedmezo run list` shows the names, which "
        "--run-id takes."
    )
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        await at.create("one")
        for call in OF_A_RUN:
            assert await complaint.beside(*call, "--coordinator", at.address) == (1, said)


async def test_orders_are_idempotent_and_told_where_they_have_no_meaning(
    complaint: Complaints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        await at.create("one")

        async def ordered(order: str) -> tuple[int, str]:
            return await complaint.beside("run", order, "one", "--coordinator", at.address)

        async def records() -> int:
            async with at.client() as client:
                return (await client.get_status("one")).records

        async def twice(order: str, phase: str) -> None:
            """Give an order two times; the second changes nothing."""
            assert await ordered(order) == (0, "")
            await at.in_phase("one", phase)
            before = await records()
            assert await ordered(order) == (0, "")
            assert await records() == before

        before = await records()
        assert await ordered("resume") == (0, "")  # It goes on already.
        assert await records() == before
        status, said = await ordered("delete")
        assert status == 2
        assert said == "Run one is not over; end it first with: fedmezo run stop one"
        await twice("pause", "PAUSED")
        assert (await ordered("delete"))[0] == 2
        await twice("resume", "RUNNING")
        await twice("pause", "PAUSED")
        await twice("stop", "FINISHED")
        for order in ("pause", "resume"):
            status, said = await ordered(order)
            assert (status, "is finished" in said) == (2, True), said
        assert await ordered("delete") == (0, "")
        status, said = await ordered("delete")
        assert status == 1
        assert said.startswith("There is no run 'one' here")


async def test_orders_to_a_run_that_is_being_created(
    complaint: Complaints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        at.loads.clear()
        async with at.client() as client:
            request = wire.CreateRunRequest(settings_toml=settings_toml("one"))
            assert await client.create_run(request) == "one"
        await at.in_phase("one", "CREATING")
        for order in ("pause", "resume", "stop"):
            status, said = await complaint.beside("run", order, "one", "--coordinator", at.address)
            assert status == 1
            assert "one" in said
        deleted = await complaint.beside("run", "delete", "one", "--coordinator", at.address)
        assert deleted == (0, "")
