"""A run that a too large rate ruins: it says why it pauses, and its best model can be had."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import ConfigError
from fedmezo_core.records import Evaluated, Paused
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import Programs, records_of, run_values, until
from tests.integration.support.parties import Workers
from tests.integration.test_snapshots import Held

RUINOUS: dict[str, Any] = {
    "seed": 3,
    "learning_rate": 0.06,
    "rounds": 40,
    "workers_min": 2,
    "quorum": 2,
}
"""It gets better for some rounds, and then worse for ever."""


def invoked(*arguments: str | Path) -> str:
    """What `fedmezo` says; raises the error that ends it."""
    found = CliRunner().invoke(client_cli.app, [str(a) for a in arguments], catch_exceptions=False)
    return found.output


@pytest.mark.timeout(400)
async def test_it_pauses_and_its_best_model_is_exported(
    programs: Programs,
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
) -> None:
    journal = tmp_path / "journal.db"
    coordinator, address = await programs.coordinator(
        *(journal, run_values(**RUINOUS)),
        *("--model", model_folder, "--heldout", heldout_file, "--evaluate-every-rounds", "1"),
    )
    working = workers.start_all(address, data_files[:2])
    held = Held(working[0].engine, 0)
    async with CoordinatorClient(address) as client:

        async def is_evaluated_or_paused(round_: int) -> bool:
            status = await client.get_status()
            is_paused = status.phase == wire.PHASE_PAUSED  # A moment after its evaluation.
            return is_paused or any(one.round == round_ for one in status.evaluations)

        for round_ in range(RUINOUS["rounds"]):
            await until(partial(is_evaluated_or_paused, round_), f"evaluation {round_}")
            status = await client.get_status()
            if status.phase == wire.PHASE_PAUSED:
                break
            held.let(round_ + 1)
        assert status.phase == wire.PHASE_PAUSED
    shown = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "status", "--coordinator", address
    )
    asked = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command",
        *("status", "--json", "--coordinator", address),
    )
    assert [await shown.wait(), await asked.wait()] == [0, 0]
    held.let(RUINOUS["rounds"])  # What was assigned before the pause must not hold it up.
    await workers.end()
    coordinator.send(signal.SIGTERM)
    assert await coordinator.wait() == 0

    records = records_of(journal)
    [reason] = [record.reason for record in records if isinstance(record, Paused)]
    evaluations = [record for record in records if isinstance(record, Evaluated)]
    best = min(evaluations, key=lambda one: one.loss)
    assert 0 < best.round < evaluations[-1].round, "or the test shows nothing"
    assert "the learning rate is too large" in reason
    assert f"the best evaluation is that of round {best.round}" in reason
    assert f"the run is paused after round {status.round}: {reason}" in coordinator.said
    assert "PAUSED" in shown.said
    assert f"round {best.round}: loss {best.loss:.4f}" in shown.said
    assert json.loads(asked.said)["best"]["round"] == best.round

    flags = ("--journal", journal, "--model", model_folder, "--threads", "1")
    said = invoked("export", tmp_path / "best", *flags, "--best")
    assert f"the model after round {best.round}, the best evaluated one" in said
    assert f"weights digest {best.weights_digest.hex()}" in said
    said = invoked("export", tmp_path / "last", *flags)
    assert f"round {status.round}, weights digest {evaluations[-1].weights_digest.hex()}" in said
    with pytest.raises(ConfigError, match="leave one of them out"):
        invoked("export", tmp_path / "both", *flags, "--best", "--round", "1")
