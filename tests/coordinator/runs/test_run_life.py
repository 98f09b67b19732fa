"""How a run of many begins, is begun again and ends, whoever goes away or fails meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fedmezo_coordinator.runs import preparing
from tests.coordinator.runs.hosting_runs import hosted


class NoReplica:
    """Stands for the supervisor of a replica that never says anything."""

    def __init__(self, *_: object) -> None:
        """Takes what the supervisor takes."""

    async def keep(self) -> None:
        """Run until cancelled."""
        await asyncio.Event().wait()


@pytest.mark.parametrize("waits", [True, False])
async def test_a_run_does_not_wait_for_a_replica_that_waits_for_its_turn(
    waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ReplicaSupervisor", NoReplica)
    changes = {"rounds": 1, "workers_min": 4, "quorum": 3}
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(
            hosted(tmp_path / "runs", monkeypatch, replicas_max=1 if waits else 2)
        )
        await at.create("first", replica=True)
        await at.create("second", replica=True, **changes)
        first = await stack.enter_async_context(at.worker("first"))
        await first.open()
        await first.assigned()
        hands = [
            await stack.enter_async_context(at.worker("second", name))
            for name in ("w1", "w2", "w3", "w4")
        ]
        for hand in hands:
            await hand.open()
        for hand, digest64 in zip(hands, (1, 1, 1, 2), strict=True):
            await hand.answer(await hand.assigned(), weights_digest64=digest64)
        if waits:  # Nobody rebuilds its weights, so its workers decide.
            await hands[0].next("finished")
        else:
            await asyncio.sleep(0.3)
            assert (await at.summary("second")).round == 0
