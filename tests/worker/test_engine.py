"""The engine: measures, applies and digests, one thing at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedmezo_core.errors import MismatchError
from fedmezo_core.events import Measure, Measured, Ticket, Work
from fedmezo_core.records import Committed, Genesis, PairRun, digest64_of, first_seed_of
from fedmezo_worker.engine import CancelledMeasurementError, Engine
from fedmezo_worker.settings import WorkerSettings

FIRST_SEED = first_seed_of(7, 1, 0)
STEPS = 2


def measure_of(pairs: int, *, eps: float = 1e-3, want_digest: bool = True) -> Measure:
    """An order for so many projected gradients."""
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + pairs))
    return Measure(Ticket(1, 1, 0), Work(seeds, 1e-6, eps, want_digest))


MEASURE = measure_of(STEPS)


@pytest.fixture
def settings(model_folder: Path, data_files: list[Path]) -> WorkerSettings:
    return WorkerSettings(name="w1", data=data_files[0], model=str(model_folder), threads=1)


@pytest.fixture
async def engine(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> AsyncIterator[Engine]:
    """An engine at the base."""
    made = Engine()
    await made.load(settings, tiny_genesis())
    yield made
    await made.close()


async def test_a_measurement_leaves_the_weights_as_they_are(engine: Engine) -> None:
    before = await engine.digest()
    measured = await engine.measure(MEASURE)
    assert await engine.digest() == before
    assert measured.weights_digest64 == digest64_of(before)
    assert len(measured.projected_grads) == 2


async def test_the_same_order_gives_the_same_bits(
    engine: Engine, settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    other = Engine()
    await other.load(settings, tiny_genesis())
    try:
        assert await engine.measure(MEASURE) == await other.measure(MEASURE)
    finally:
        await other.close()


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
async def test_a_projected_gradient_for_each_probe_of_each_step(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis], estimator: str
) -> None:
    engines = {probes: Engine() for probes in (1, 3)}
    try:
        for probes, engine in engines.items():
            await engine.load(settings, tiny_genesis(probes=probes, estimator=estimator))
        found = {
            probes: await engine.measure(measure_of(STEPS * probes))
            for probes, engine in engines.items()
        }
    finally:
        for engine in engines.values():
            await engine.close()
    assert len(found[3].projected_grads) == STEPS * 3
    # The first step's first probe is the run's with one: same seed, batch and weights.
    assert found[3].projected_grads[0] == pytest.approx(found[1].projected_grads[0], rel=0.05)


async def test_one_sided_gradients_come_near_the_two_sided(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    found = []
    for estimator in ("two_sided", "one_sided"):
        engine = Engine()
        try:
            await engine.load(settings, tiny_genesis(estimator=estimator, eps=1e-4))
            found.append((await engine.measure(measure_of(STEPS, eps=1e-4))).projected_grads)
        finally:
            await engine.close()
    assert found[0] != found[1]
    # They differ by the curvature along z, which is proportional to eps.
    assert found[0][0] == pytest.approx(found[1][0], abs=0.1)


async def test_a_digest_is_taken_only_if_asked_for(engine: Engine) -> None:
    measured = await engine.measure(measure_of(1, want_digest=False))
    assert measured.weights_digest64 is None


async def test_commits_one_by_one_or_at_once_give_the_same_weights(
    engine: Engine, settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    commits = [Committed(k, (PairRun(k << 16, (0.5, -0.25)),), 99 + k) for k in (1, 2, 3)]
    other = Engine()
    await other.load(settings, tiny_genesis())
    try:
        await engine.apply(commits)
        for commit in commits:
            await other.apply([commit])
        assert await engine.digest() == await other.digest()
    finally:
        await other.close()


async def test_a_measurement_can_be_cut_short_at_its_next_step(engine: Engine) -> None:
    order = measure_of(4096)
    measuring = asyncio.create_task(engine.measure(order))
    await asyncio.sleep(0)  # Its start clears the flag; only then can it be cut short.
    engine.cut_short()
    with pytest.raises(CancelledMeasurementError):
        await asyncio.wait_for(measuring, 30)
    assert isinstance(await engine.measure(MEASURE), Measured)


async def test_another_base_is_refused(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis()
    other = Genesis(genesis.config, genesis.manifest_digest, b"x" * 32, b"y" * 32, 1, 4)
    engine = Engine()
    with pytest.raises(MismatchError, match="load the same files of tiny as the coordinator"):
        await engine.load(settings, other)
    await engine.close()


async def test_weights_on_a_disk_change_nothing(
    engine: Engine,
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    room = (model_folder / "model.safetensors").stat().st_size // 2
    changes = {"device_memory_max": room, "offload_folder": tmp_path}
    commits = [Committed(k, (PairRun(k << 16, (0.5, -0.25)),), 99 + k) for k in (1, 2, 3)]
    await engine.apply(commits)
    expected = await engine.measure(MEASURE)
    # Twice: a worker that starts again finds the base, not what the one before it has left.
    for _ in range(2):
        other = Engine()
        await other.load(settings.model_copy(update=changes), tiny_genesis())
        try:
            await other.apply(commits)
            assert await other.measure(MEASURE) == expected
        finally:
            await other.close()
