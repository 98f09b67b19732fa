"""What a worker checks and says before it loads anything."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.errors import StartingError, WrongRunError
from fedmezo_core.wire import reconnecting
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_worker.worker_command import main


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n')
    return path


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--data", "There is no data file or folder {gone}; check the path."),
        ("--heldout", "There is no data file or folder {gone}; check the path."),
        ("--adapter", "There is no adapter folder {gone}; check adapter."),
    ],
)
def test_a_path_that_is_not_there_costs_no_import_of_torch(
    rows: Path,
    flag: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Whatever imports it from here on fails.
    monkeypatch.setitem(sys.modules, "fedmezo_core.zo.model.allocator", None)
    gone = rows.with_name("gone")
    flags = {"--name": "w1", "--data": str(rows), flag: str(gone)}
    assert main([f"{key}={value}" for key, value in flags.items()]) == 2
    assert capsys.readouterr().err == f"fedmezo-worker: {said.format(gone=gone)}\n"


def test_a_join_string_that_was_cut_off_is_a_flag_of_no_use(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--data={rows}", "--join=fedmezo1:cut-off"]) == 2
    assert "join string" in capsys.readouterr().err


def test_a_worker_says_at_once_what_it_does(
    rows: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    attempts = iter([StartingError("It loads."), StartingError("It loads."), WrongRunError("No.")])

    async def refuse(*_: Any) -> None:
        raise next(attempts)

    monkeypatch.setattr(CoordinatorClient, "offered_runs", refuse)
    monkeypatch.setattr(reconnecting, "delay_s", lambda *_: 0.0)
    flags = ["--name=w1", f"--data={rows}", "--coordinator=127.0.0.1:9", "--give-up-after-s=0"]
    assert main(flags) == 1
    assert caplog.messages == [
        "worker w1 of the coordinator at 127.0.0.1:9 is starting",
        "connecting to 127.0.0.1:9",
        "It loads. Waiting until then.",
    ]
