"""A worker with a privacy budget: what it sends, what it repeats, and when it stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedmezo_core.errors import ConfigError, PrivacyBudgetError, PrivacyError
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.records import Committed, Genesis, SeedRange, first_seed_of
from fedmezo_worker.engine import Engine
from fedmezo_worker.worker_settings import WorkerSettings

SEEDS = (first_seed_of(7, 1, 0), first_seed_of(7, 1, 0) + 1)

Opens = Callable[..., Awaitable[Engine]]


def order(round_: int = 1, epoch: int = 1, seeds: tuple[int, ...] = SEEDS) -> Measure:
    return Measure(Ticket(epoch, round_, 0), Work(seeds, 1e-6, 1e-3, want_digest=False))


@pytest.fixture
async def opens(
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
) -> AsyncIterator[Opens]:
    """Opens an engine, or the given one again, with a budget and these settings and contract."""
    async with AsyncExitStack() as stack:

        async def opened(
            run: dict[str, Any] | None = None, engine: Engine | None = None, **changes: Any
        ) -> Engine:
            settings = WorkerSettings(
                name="w1",
                data=data_files[0],
                model=str(model_folder),
                threads=1,
                **{
                    "privacy_epsilon": 8.0,
                    "privacy_delta": 1e-3,
                    "privacy_clip": 1.0,
                    "privacy_ledger": tmp_path / "ledger",
                    **changes,
                },
            )
            if engine is None:
                engine = Engine()
                stack.push_async_callback(engine.close)
            contract = {"rounds": 3, "batch_size": 2, "report_losses": False, **(run or {})}
            await engine.load(settings, tiny_genesis(**contract))
            return engine

        yield opened


async def test_an_answer_is_noise_and_is_repeated(opens: Opens) -> None:
    engine = await opens()
    first = await engine.measure(order())
    assert len(first.scalars.projected_grads) == len(SEEDS)
    # A new coordinator start asks again, under another epoch.
    again = await engine.measure(order(epoch=2))
    assert again.scalars == first.scalars
    assert again.ticket.epoch == 2
    other = await engine.measure(order(round_=2))
    assert other.scalars.projected_grads != first.scalars.projected_grads


async def test_a_restarted_worker_repeats_what_it_said(opens: Opens, tmp_path: Path) -> None:
    engine = await opens()
    first = await engine.measure(order())
    await opens(engine=engine)
    assert (await engine.measure(order())).scalars == first.scalars
    await opens(engine=engine, privacy_ledger=tmp_path / "another")
    assert (await engine.measure(order())).scalars != first.scalars


async def test_other_weights_are_another_measurement(opens: Opens) -> None:
    engine = await opens()
    first = await engine.measure(order())
    await engine.apply([Committed(1, (SeedRange(3, (0.5,)),), 1)])
    assert (await engine.measure(order())).scalars != first.scalars


async def test_no_loss_and_no_count_of_rows_leaves(opens: Opens) -> None:
    engine = await opens()
    scalars = (await engine.measure(order())).scalars
    assert (scalars.mean_loss, scalars.rows) == (0.0, 1)


async def test_a_spent_budget_ends_the_worker(opens: Opens) -> None:
    engine = await opens(privacy_epsilon=2.0)
    for round_ in (1, 2, 3):
        await engine.measure(order(round_))

    async def more_than_the_run_has() -> None:
        for round_ in range(4, 30):
            await engine.measure(order(round_))

    with pytest.raises(PrivacyBudgetError, match=r"above privacy_epsilon = 2 .*leaves the run"):
        await more_than_the_run_has()
    # What was said before is no new gift.
    await engine.measure(order(2))


async def test_a_ledger_belongs_to_one_worker_at_a_time(opens: Opens) -> None:
    await opens()
    with pytest.raises(PrivacyError, match="no other worker has it open"):
        await opens()


@pytest.mark.parametrize(
    ("run", "settings", "sentence"),
    [
        ({"report_losses": True}, {}, "allows no report_losses"),
        ({"weighting": "rows"}, {}, 'allows no weighting = "rows"'),
        ({"batch_size": 512}, {}, "fewer than batch_size = 512"),
        ({}, {"privacy_delta": 0.5}, "is not below 1 /"),
    ],
)
async def test_what_the_guarantee_does_not_allow_is_refused(
    opens: Opens, run: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        await opens(run, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"privacy_epsilon": 1.0}, "privacy_epsilon needs privacy_clip"),
        ({"privacy_epsilon": 1.0, "privacy_clip": 1.0}, "needs privacy_ledger"),
        ({"privacy_clip": 1.0}, "privacy_clip needs privacy_epsilon"),
        ({"privacy_delta": 1e-6}, "privacy_delta needs privacy_epsilon"),
        ({"privacy_epsilon": 0.0}, "greater than 0"),
    ],
)
def test_half_a_budget_is_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        WorkerSettings(name="w1", data=tmp_path, **settings)
