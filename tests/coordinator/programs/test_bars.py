"""Bars of long steps on a terminal, and which steps the commands show."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core import program
from fedmezo_core.program import LongStep, show_steps_with
from tests.integration.support.harness import config_of, genesis_of, write_genesis

PROGRAM = """
import time
from fedmezo_coordinator.programs.bars import show_bar
from fedmezo_core.program import long_step, show_steps_with

show_steps_with(show_bar)
with long_step("reading [red]", 3000, "records") as step:
    step.advance(1200)
    time.sleep(0.3)
    with long_step("inside"):
        time.sleep(1.6)
    print("a line")
"""


def test_a_bar_is_drawn_on_a_terminal_and_a_file_gets_its_lines(tmp_path: Path) -> None:
    ours, its = pty.openpty()
    out = tmp_path / "out.txt"
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=file,
            stderr=its,
            env=os.environ | {"COLUMNS": "100", "TERM": "xterm"},
        )
        os.close(its)
        drawn = b""
        while True:
            try:
                drawn += os.read(ours, 4096)
            except OSError:  # the terminal of a process that ended
                break
        os.close(ours)
        assert process.wait() == 0
    assert b"reading [red]" in drawn
    assert b"1,200 of 3,000 records" in drawn
    assert b"inside" not in drawn
    assert drawn.rfind(b"\x1b[?25h") > drawn.rfind(b"\x1b[?25l")  # The cursor is back.
    assert out.read_text() == "a line\n"


@pytest.fixture
def shown() -> Iterator[list[str]]:
    """The steps that were shown, in their order."""
    steps: list[str] = []

    def show(step: LongStep, over: threading.Event) -> None:
        steps.append(step.what)
        over.wait()

    before = program._show_step
    show_steps_with(show)
    yield steps
    show_steps_with(before)


def test_the_commands_show_their_long_steps(tmp_path: Path, shown: list[str]) -> None:
    journal, copy = tmp_path / "journal.db", tmp_path / "copy.db"
    write_genesis(journal, genesis_of(config_of()))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 20)
    out = tmp_path / "out"
    for arguments, steps in [
        (["journal", "verify", str(journal)], ["reading the journal"]),
        (
            ["journal", "restore", str(journal), str(copy)],
            ["reading the journal", f"writing {copy}"],
        ),
        (
            ["split", str(rows), "--out", str(out), "--workers", "2"],
            [f"reading {rows}", f"writing {out}"],
        ),
    ]:
        shown.clear()
        result = CliRunner().invoke(client_cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert shown == steps
