"""The battery for workers with a real model: digests of weights, and measurements."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fedmezo_coordinator.conformance.reference import likeness, open_reference
from fedmezo_coordinator.conformance.report import Report
from fedmezo_coordinator.conformance.scripted_server import scripted
from fedmezo_coordinator.conformance.worker_battery import (
    CORRELATION,
    DIFFERENCE,
    WorkerBattery,
    WorkerTest,
)
from tests.integration.support.harness import PATIENCE_S, config_of
from tests.integration.support.parties import Workers

CONTRACT: dict[str, Any] = {
    "rounds": 60,
    "local_steps": 1,
    "probes": 8,
    "estimator": "one_sided",
    "distribution": "low_rank_1",
    "normalized_step": True,
    "report_losses": True,
    "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True},
}


async def found(
    model_folder: Path, ours: Path, theirs: Path, workers: Workers, **changes: Any
) -> dict[str, str]:
    """What fails of a real worker that has the rows `theirs`, where we think it has `ours`."""
    config = config_of(**(CONTRACT | changes))
    reference = await asyncio.to_thread(open_reference, config, str(model_folder), ours, threads=1)
    report = Report("worker")
    test = WorkerTest(reference.genesis, reference, likeness, patience_s=PATIENCE_S)
    battery = WorkerBattery(test, report)
    async with scripted(battery.server, "127.0.0.1:0") as address:
        worker = workers.start(address, "w1", theirs)
        await battery.run()
        assert await worker.outcome() is None
    assert len(report.checks) > 25
    if ours == theirs:
        assert min(report.figures.values()) == report.figures[DIFFERENCE] < 1e-3
        assert report.figures[CORRELATION] > 0.999
    return {check.name: check.detail for check in report.checks if check.outcome == "failed"}


async def test_a_real_workers_weights_and_measurements_are_ours(
    model_folder: Path, data_files: list[Path], workers: Workers
) -> None:
    assert not await found(model_folder, data_files[0], data_files[0], workers)


async def test_a_worker_with_other_rows_is_found(
    model_folder: Path, data_files: list[Path], workers: Workers
) -> None:
    failed = await found(model_folder, data_files[1], data_files[3], workers, dtype="bfloat16")
    assert "projected gradients correlate" in failed["answers its first assignment"]
    # Weights depend on commits alone.
    assert not any("weights" in seen for seen in failed.values())


def test_likeness_is_about_values_and_not_about_their_mean() -> None:
    assert likeness([3.0, 4.0], [3.0, 4.0]) == (1.0, 0.0)
    assert likeness([3.0, 4.0], [-3.0, -4.0])[0] == -1.0
    assert likeness([0.0, 0.0], [0.0, 0.0]) == (1.0, 0.0)
    assert likeness([0.0], [1.0])[0] == 0.0
    correlation, difference = likeness([3.0, 4.0], [3.0, 4.5])
    assert correlation > 0.998
    assert abs(difference - 0.5 / (12.5**0.5)) < 1e-12
