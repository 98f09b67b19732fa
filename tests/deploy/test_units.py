"""The units for systemd, as systemd itself reads them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, output_of, tool

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EXPOSURE_MAX = 2.0
"""Largest exposure by `systemd-analyze security`, which is from 0 (good) to 10."""


def test_there_is_one_for_every_daemon() -> None:
    names = [f"fedmezo-{name}.service" for name in ("coordinator", "relay", "worker")]
    assert [unit.name for unit in UNITS] == names


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_it_and_finds_it_closed(unit: Path, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    here = tmp_path / unit.name
    here.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text()))
    assert output_of(analyze, "verify", here).strip() == ""
    said = output_of(analyze, "security", "--offline=true", "--no-pager", here)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert found is not None
    assert float(found[1]) <= EXPOSURE_MAX, said


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_neither_the_end_of_a_run_nor_a_wrong_setting_starts_it_again(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    for line in (
        "Type=notify",
        "Restart=on-failure",
        "RestartPreventExitStatus=2",
        "WatchdogSec=60",
    ):
        assert line in lines
