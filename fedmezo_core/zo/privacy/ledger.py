"""The durable record of what a worker's data has given away, and of what exactly it has said."""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_core.errors import PrivacyError
from fedmezo_core.zo.privacy.accounting import NoisyStep

_HEADER = {"fedmezo_privacy_ledger": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement that was made noisy, and that may have been sent."""

    key: str
    """Names what was measured: the run, the weights, the seeds."""
    run: str
    round: int
    step: NoisyStep
    step_count: int
    projected_grads: tuple[float, ...]
    """The noisy binary32 values."""


class Ledger:
    """A file of JSON lines. An entry is on the disk before its values leave the worker.

    One ledger belongs to one data set, over all its runs. Only one process can have it open.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin the ledger at `path`; raises `PrivacyError` if it cannot be used."""
        self.path = path
        self._spent: Counter[NoisyStep] = Counter()
        self._of_runs: Counter[str] = Counter()
        self._newest_of_runs: dict[str, NoisyStep] = {}
        self._said: dict[str, tuple[float, ...]] = {}
        # After an append that failed, nobody knows where the file ends.
        self._is_broken = False
        try:
            is_new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._close = weakref.finalize(self, os.close, self._file)
            self._open(is_new=is_new)
        except OSError as error:
            raise PrivacyError(
                f"The privacy ledger {path} cannot be used ({error.strerror}); check "
                "privacy_ledger, and that no other worker has it open."
            ) from None

    def close(self) -> None:
        """Let another process open it; done by itself when nothing refers to it any more."""
        self._close()

    @property
    def spent(self) -> Counter[NoisyStep]:
        """How many steps of each kind were made."""
        return self._spent.copy()

    def steps_of(self, run: str) -> int:
        """How many steps of a run were made."""
        return self._of_runs[run]

    def newest_step_of(self, run: str) -> NoisyStep | None:
        """How the newest step of a run was made noisy; None before its first."""
        return self._newest_of_runs.get(run)

    def said(self, key: str) -> tuple[float, ...] | None:
        """What was said when `key` was measured before; None if it was not."""
        return self._said.get(key)

    def add(self, entry: Entry) -> None:
        """Make an entry durable; raises `PrivacyError`, after which nothing may be sent."""
        self._append(
            {
                "key": entry.key,
                "run": entry.run,
                "round": entry.round,
                "noise_multiplier": entry.step.noise_multiplier,
                "sampling_probability": entry.step.sampling_probability,
                "steps": entry.step_count,
                "projected_grads": entry.projected_grads,
            }
        )
        self._take(entry)

    def _open(self, *, is_new: bool) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(self._file, "rb", closefd=False) as file:
            content = file.read()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            # A crash tore it off before it was durable, so that its values were never sent.
            os.ftruncate(self._file, len(content) - len(torn))
        if not whole:
            self._append(_HEADER)
            if is_new:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            return
        for entry in _entries_in(whole, self.path):
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        self._spent[entry.step] += entry.step_count
        self._of_runs[entry.run] += entry.step_count
        self._newest_of_runs[entry.run] = entry.step
        self._said[entry.key] = entry.projected_grads

    def _append(self, line: object) -> None:
        serialized = json.dumps(line, allow_nan=False).encode() + b"\n"
        if self._is_broken:
            raise PrivacyError(
                f"The privacy ledger {self.path} took no entry before; start the worker again."
            )
        try:
            if os.write(self._file, serialized) != len(serialized):
                raise OSError(0, "the disk took a part")
            os.fsync(self._file)
        except OSError as error:
            self._is_broken = True
            raise PrivacyError(
                f"The privacy ledger {self.path} took no entry ({error.strerror}); nothing was "
                "sent. Make room on the disk, and start the worker again."
            ) from None


def steps_in(entries: Iterable[Entry]) -> Counter[NoisyStep]:
    """How many steps of each kind these entries stand for."""
    steps: Counter[NoisyStep] = Counter()
    for entry in entries:
        steps[entry.step] += entry.step_count
    return steps


def read_ledger(path: Path) -> list[Entry]:
    """The entries of the ledger at `path`, which a worker may have open; raises `PrivacyError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PrivacyError(
            f"The privacy ledger {path} cannot be read ({error.strerror}); check the path."
        ) from None
    return list(_entries_in(content.rpartition(b"\n")[0], path))


def _entries_in(lines: bytes, path: Path) -> Iterator[Entry]:
    """The entries of whole lines, of which the first is the header."""
    for number, line in enumerate(lines.split(b"\n"), 1):
        try:
            read = json.loads(line)
            if number == 1:
                if read != _HEADER:
                    raise ValueError
                continue
            yield _entry_of(read)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise PrivacyError(
                f"Line {number} of {path} is not one of a privacy ledger; put the newest whole "
                "ledger back, because what it holds is spent."
            ) from None


def _entry_of(line: Any) -> Entry:
    step = NoisyStep(float(line["noise_multiplier"]), float(line["sampling_probability"]))
    grads = tuple(float(grad) for grad in line["projected_grads"])
    count = int(line["steps"])
    if not (step.noise_multiplier > 0 and 0 < step.sampling_probability <= 1 and count > 0):
        raise ValueError
    return Entry(str(line["key"]), str(line["run"]), int(line["round"]), step, count, grads)
