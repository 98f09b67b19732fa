"""docs/taking-it-home.md: each command of ours that it shows is run as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.home.conftest import FinishedRun, invoked

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/taking-it-home.md"


def commands_under(heading: str) -> list[list[str]]:
    """The commands of `fedmezo` in the section of that heading, without the program's name."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{heading}\n")]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("fedmezo ")]


@pytest.mark.parametrize("headings", [("Export", "Try it"), ("The journal alone",)])
def test_the_commands_of_the_page_work(
    headings: tuple[str, ...],
    lora_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf, which is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lora_run.model, "base")
    shutil.copy(lora_run.journal, "journal.db")
    shutil.copy(lora_run.heldout, "heldout.jsonl")
    shutil.copy(lora_run.config, "coordinator.toml")
    commands = [command for heading in headings for command in commands_under(heading)]
    assert len(commands) >= 3
    for command in commands:
        assert invoked(*command)
