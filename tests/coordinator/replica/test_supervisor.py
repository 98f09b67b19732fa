"""The supervisor of the replica's process, with processes of a shell in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.replica import supervisor
from fedmezo_coordinator.replica.supervisor import ReplicaSupervisor, describe_base
from fedmezo_coordinator.serving.status_report import ReplicaView
from fedmezo_core.errors import ModelError
from fedmezo_core.program import STOP_WITHIN_S
from tests.integration.support.harness import config_of, until


def supervised(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ReplicaSupervisor, ReplicaView]:
    """A supervisor that starts `program`, without a wait between two starts."""
    monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(program)))
    monkeypatch.setattr(supervisor, "delay_s", lambda *_, **__: 0.01)
    view = ReplicaView()
    settings = CoordinatorSettings(model="base", heldout=Path("rows.jsonl"))
    return ReplicaSupervisor(settings, "unix:nowhere", "run", b"secret", view), view


def shell(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


async def test_a_replica_that_cannot_be_started_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, view = supervised(tmp_path / "program", monkeypatch)
    keeping = asyncio.create_task(keeper.keep())
    while not view.complaint:
        await asyncio.wait_for(asyncio.sleep(0.01), 1)
        assert not keeping.done(), "it gave up"
    assert "No such file" in view.complaint
    shell(tmp_path / "new", "exit 0").rename(tmp_path / "program")
    await asyncio.wait_for(keeping, 20)


async def test_a_line_that_is_too_long_does_not_end_the_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2; echo 'ConfigError: no' >&2; exit 2"
    keeper, view = supervised(shell(tmp_path / "program", text), monkeypatch)
    await asyncio.wait_for(keeper.keep(), 20)
    assert view.complaint == "the replica stopped: ConfigError: no"
    assert not view.evaluates


async def test_a_replica_that_does_not_end_is_killed_before_the_coordinator_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = tmp_path / "ready"
    text = f"trap '' TERM; touch {ready}; for n in $(seq 99); do sleep 0.1; done"
    keeper, _ = supervised(shell(tmp_path / "program", text), monkeypatch)
    keeping = asyncio.create_task(keeper.keep())

    async def is_ready() -> bool:
        return ready.exists()

    await until(is_ready, "the program")
    keeping.cancel()
    _, pending = await asyncio.wait([keeping], timeout=STOP_WITHIN_S - 1)
    assert not pending


async def test_why_a_base_cannot_be_described_is_told_whatever_a_library_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "echo welcome to this library; echo 'ModelError: it is damaged.' >&2; exit 2"
    supervised(shell(tmp_path / "program", text), monkeypatch)
    with pytest.raises(ModelError, match=r"^it is damaged\.$"):
        await describe_base(CoordinatorSettings(model="base"), config_of())
