"""The writes in one turn of the event loop."""

from __future__ import annotations

import asyncio

import pytest

from fedmezo_coordinator.serving.write_pacing import WritePacing


@pytest.mark.parametrize(("count", "turns"), [(2, 1), (3, 1), (4, 2), (7, 3)])
async def test_a_few_writes_are_let_through_in_each_turn_in_order(count: int, turns: int) -> None:
    pacing, turn = WritePacing(3), 0
    through: list[tuple[int, int]] = []

    async def go(number: int) -> None:
        await pacing.next_write()
        through.append((number, turn))

    tasks = [asyncio.create_task(go(number)) for number in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    assert [number for number, _ in through] == list(range(count))
    by_turn = [at for _, at in through]
    assert len(set(by_turn)) == turns
    assert max(by_turn.count(at) for at in by_turn) <= 3


async def test_a_cancelled_write_delays_no_other() -> None:
    pacing = WritePacing(1)
    first, gone, last = (asyncio.create_task(pacing.next_write()) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait_for(asyncio.gather(first, last), 10)
    assert gone.cancelled()
    for _ in range(3):  # and afterwards it stands still
        await asyncio.sleep(0)
    await asyncio.wait_for(pacing.next_write(), 10)
