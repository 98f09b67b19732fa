"""Bars of long steps on a terminal, the log above them, and which steps the commands show."""

from __future__ import annotations

import os
import pty
import re
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
from tests.integration.support.harness import (
    config_of,
    environment,
    genesis_of,
    write_genesis,
)

DAEMON = """
import asyncio, logging, sys, time
from fedmezo_core.layered_settings import ProgramSettings
from fedmezo_core.program import long_step, run_daemon

async def run(_settings):
    with long_step("reading [red]", 3000, "records") as step:
        step.advance(1200)
        time.sleep(0.3)
        with long_step("inside"):
            time.sleep(1.6)
        logging.getLogger("fedmezo.test").info("a line of the log " + "that is long " * 9)
        print("a line of the output")
        time.sleep(0.5)
    with long_step("later"):
        time.sleep(1.6)
    logging.getLogger("fedmezo.test").info("the end")

sys.exit(run_daemon("daemon", ProgramSettings, run))
"""


def on_a_terminal(
    out: Path, *arguments: str, term: str = "xterm", before: tuple[str, ...] = ()
) -> str:
    """What the daemon writes to a terminal of 100 columns; its standard output is a file."""
    ours, its = pty.openpty()
    with out.open("wb") as file:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", DAEMON, *arguments],
            stdout=file,
            stderr=its,
            env=environment(COLUMNS="100", TERM=term),
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
    return drawn.decode()


def screen(drawn: str) -> list[str]:
    """The lines that a person sees at the end, without colours."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", drawn):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_bars_are_drawn_on_a_terminal_and_leave_the_log_whole(tmp_path: Path) -> None:
    drawn = on_a_terminal(tmp_path / "out.txt")
    assert "reading [red]" in drawn
    assert "1,200 of 3,000 records" in drawn
    assert "inside" not in drawn
    assert "later" in drawn
    assert "\x1b[?25l" not in drawn  # Whoever kills the program keeps the cursor.
    first, last = screen(drawn)
    assert re.fullmatch(r"\S+ \S+ INFO    a line of the log (that is long ?){9}", first)
    assert last.endswith("INFO    the end")
    assert (tmp_path / "out.txt").read_text() == "a line of the output\n"


def test_bars_are_drawn_without_a_standard_output(tmp_path: Path) -> None:
    drawn = on_a_terminal(tmp_path / "out.txt", before=("sh", "-c", 'exec "$@" >&-', "sh"))
    assert "1,200 of 3,000 records" in drawn
    assert "Traceback" not in drawn


@pytest.mark.parametrize(("arguments", "term"), [(("--log-format=json",), "xterm"), ((), "dumb")])
def test_no_bars_in_logs_for_machines_and_on_dumb_terminals(
    tmp_path: Path, arguments: tuple[str, ...], term: str
) -> None:
    drawn = on_a_terminal(tmp_path / "out.txt", *arguments, term=term)
    assert "\x1b" not in drawn
    assert "reading" not in drawn  # It took less than the time of a line of the log.
    assert drawn.count("\n") == 2


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
