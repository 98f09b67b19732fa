"""The battery for a fleet's coordinator: it speaks as members, over mutual TLS."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.wire import admission
from tests.integration.support.fleets import ServedFleet, served_fleet
from tests.integration.support.harness import config_of, environment, genesis_of

RUN: dict[str, Any] = {"rounds": 9, "workers_min": 2, "quorum": 2, "digest_every_rounds": 2}
NAMES = ("w1", "w2", "w3")
OWN = {
    "refuses a member under another name",
    "refuses a hello without the member's key",
    "refuses a hello with another key than the member's",
    "keeps the signatures of its members' answers",
    "ends a session whose answers are not signed with its key",
}


async def called(address: str, folders: Sequence[Path], *more: str) -> tuple[str, str]:
    """What the command writes: its output and its errors.

    It has a process of its own: in one process all event loops would share one poller of gRPC.
    """
    states = [one for folder in folders for one in ("--state", folder)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from fedmezo_coordinator.__main__ import fedmezo; fedmezo()"),
        *("conformance", "coordinator", address, *states, *more),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return output.decode(), errors.decode()


async def outcomes(at: ServedFleet) -> dict[str, str]:
    """Name -> outcome of each check by three members and the operator."""
    for name in NAMES:
        await at.member(name)
    folders = [at.state, *(at.folder / name for name in NAMES)]
    output, errors = await called(at.address, folders, "--format", "json")
    assert output, errors
    checks = json.loads(output)["checks"]
    print(*(f"{one['name']}: {one['outcome']} {one.get('detail')}" for one in checks), sep="\n")
    return {one["name"]: one["outcome"] for one in checks}


async def test_a_fleet_s_coordinator_conforms_to_its_members(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, genesis_of(config_of(**RUN))) as at:
        found = await outcomes(at)
    assert set(found.values()) <= {"passed", "skipped"}
    assert {found[name] for name in OWN} == {"passed"}
    assert found["finishes the run"] == "passed"


async def test_one_that_checks_no_signature_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_check_signature", lambda *_: None)
    async with served_fleet(tmp_path, genesis_of(config_of(**RUN))) as at:
        found = await outcomes(at)
    assert found["ends a session whose answers are not signed with its key"] == "failed"


async def test_members_that_are_too_few_or_no_workers_are_named(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, genesis_of(config_of(**RUN))) as at:
        await at.member("w1")
        _, few = await called(at.address, [at.state, at.folder / "w1"])
        _, none = await called(at.address, [at.state])
    assert "needs 2 workers, and --state names 1" in few
    assert "names no worker's folder" in none
