"""`fedmezo privacy`: what a ledger says has been given away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_core.errors import ConfigError, PrivacyError
from fedmezo_core.zo.privacy.accounting import NoisyStep, epsilon_of
from fedmezo_core.zo.privacy.ledger import Entry, Ledger

STEP = NoisyStep(1.5, 0.1)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of three measurements, of two local steps each."""
    held = Ledger(tmp_path / "ledger")
    for round_ in (1, 2, 3):
        held.add(Entry(f"{round_}", "reviews:00ff", round_, STEP, 2, (0.5, -0.5)))
    held.close()
    return held.path


def test_it_says_what_was_spent_and_in_which_runs(ledger: Path) -> None:
    answer = CliRunner().invoke(app, ["privacy", str(ledger), "--delta", "1e-4"])
    spent = epsilon_of({STEP: 6}, 1e-4)
    assert f"epsilon {spent:.2f} at delta 0.0001, for 3 measurements" in answer.output
    assert "run reviews: up to round 3" in answer.output


def test_as_json_while_a_worker_has_it_open(ledger: Path) -> None:
    held = Ledger(ledger)
    answer = CliRunner().invoke(app, ["privacy", str(ledger), "--json"])
    held.close()
    assert json.loads(answer.output) == {
        "epsilon": epsilon_of({STEP: 6}, 1e-5),
        "delta": 1e-5,
        "measurements": 3,
        "newest_rounds": {"reviews": 3},
    }


def test_bad_input_has_its_sentence(tmp_path: Path, ledger: Path) -> None:
    missing = CliRunner().invoke(app, ["privacy", str(tmp_path / "none")])
    assert isinstance(missing.exception, PrivacyError)
    assert "cannot be read (No such file or directory)" in str(missing.exception)
    chance = CliRunner().invoke(app, ["privacy", str(ledger), "--delta", "2"])
    assert isinstance(chance.exception, ConfigError)
