"""`fedmezo watch` and `fedmezo run watch`, while the coordinator comes and goes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from fedmezo_coordinator.programs.connecting import Link
from fedmezo_coordinator.programs.run_commands.watching import watch_run
from fedmezo_core.errors import UnavailableError
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs


class Ending:
    """Stands for a client whose coordinator ends with its run."""

    run_id = ""

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        yield self

    async def get_status(self, _run_id: str) -> wire.GetStatusResponse:
        return wire.GetStatusResponse(phase=wire.PHASE_FINISHED, round=7)

    async def list_runs(self, _run_id: str) -> list[runs.RunSummary]:
        raise UnavailableError("It has ended.")


async def test_the_last_status_is_shown_of_a_coordinator_that_ends_with_its_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await watch_run(cast("Link", Ending()), 0.01, OutputFormat.TEXT)
    assert "7" in capsys.readouterr().out
