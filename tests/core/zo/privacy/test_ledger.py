"""What was given away stays on record, over crashes and restarts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedmezo_core.errors import PrivacyError
from fedmezo_core.zo.privacy.accounting import NoisyStep
from fedmezo_core.zo.privacy.ledger import Entry, Ledger

STEP = NoisyStep(1.25, 0.1)


def entry(key: str, run: str = "reviews:1", grads: tuple[float, ...] = (0.5, -1.25)) -> Entry:
    return Entry(key, run, 3, STEP, 2, grads)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def test_it_holds_what_was_added_after_it_is_opened_again(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add(entry("a"))
    ledger.add(entry("b", run="other:2"))
    ledger.close()
    again = Ledger(path)
    assert again.spent == {STEP: 4}
    assert again.said("a") == (0.5, -1.25)
    assert again.said("c") is None
    assert (again.steps_of("reviews:1"), again.newest_step_of("reviews:1")) == (2, STEP)
    assert again.newest_step_of("none") is None
    again.close()


def test_only_its_owner_reads_it(path: Path) -> None:
    Ledger(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_worker_cannot_open_it(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(PrivacyError, match="no other worker has it open"):
        Ledger(path)
    ledger.close()
    Ledger(path).close()


def test_a_ledger_that_nothing_refers_to_is_closed(path: Path) -> None:
    Ledger(path)
    Ledger(path).close()


def test_every_torn_end_is_an_entry_that_was_never_sent(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add(entry("a"))
    begin = path.stat().st_size
    ledger.add(entry("b"))
    ledger.close()
    whole = path.read_bytes()
    for length in range(begin, len(whole)):
        path.write_bytes(whole[:length])
        torn = Ledger(path)
        assert torn.spent == {STEP: 2}
        torn.add(entry("c"))
        torn.close()
        again = Ledger(path)
        assert again.spent == {STEP: 4}
        again.close()


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"key": "a"}',
        b'{"key": "a", "run": "r", "round": 1, "noise_multiplier": -1, "sampling_probability": 1}',
    ],
)
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    ledger = Ledger(path)
    ledger.add(entry("a"))
    ledger.close()
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(PrivacyError, match=r"Line 3 of .*ledger is not one"):
        Ledger(path)


def test_another_file_is_no_ledger(path: Path) -> None:
    path.write_text("text of mine\n")
    with pytest.raises(PrivacyError, match="Line 1"):
        Ledger(path)
    assert path.read_text() == "text of mine\n"


def test_a_folder_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="check privacy_ledger"):
        Ledger(tmp_path)


def test_a_full_disk_is_told_before_anything_is_sent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path)

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PrivacyError, match=r"took no entry \(No space left on device\)"):
            ledger.add(entry("a"))
    assert ledger.said("a") is None
    with pytest.raises(PrivacyError, match="took no entry before; start the worker again"):
        ledger.add(entry("b"))
    ledger.close()
    Ledger(path).close()
