"""Fuzzing one target in this process, with atheris where it is installed and without it elsewhere.

    python -m tests.fuzz.engine TARGET --seconds 60 --seed 1 --report FILE --findings FOLDER

With atheris, inputs that reach new code join the ones that are changed further. Every exception but
a `FedMezoError`, and every input that takes too long, is written to the folder of findings. A
process that does not end in time shows where it is, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import logging
import mmap
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

HANG_S: Final = 10.0
"""Time after which an input hangs, on a busy machine too."""
LATE_S: Final = 60.0
"""Most time that the process takes beside its fuzzing."""
REPORT_EVERY_S: Final = 0.5
FINDINGS_MAX: Final = 20
"""Different findings that one process writes."""
INPUT_MAX: Final = 1 << 20
_LENGTH_BYTES: Final = 4
INSTRUMENTED: Final = ["fedmezo_core", "fedmezo_coordinator", "fedmezo_worker", "fedmezo"]


class HangError(Exception):
    """An input took too long."""


class InputInHand:
    """Shares the input that is being tried with whoever started the process."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.truncate(_LENGTH_BYTES + INPUT_MAX)
            self._shared = mmap.mmap(file.fileno(), 0)

    def take(self, data: bytes) -> None:
        """Keep an input; b"": none is being tried."""
        shared, end = self._shared, _LENGTH_BYTES + len(data)
        shared[_LENGTH_BYTES:end] = data
        shared[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")

    @staticmethod
    def left(path: Path) -> bytes:
        """The input that a process had when it ended; b"": it had none."""
        kept = path.read_bytes() if path.exists() else bytes(_LENGTH_BYTES)
        length = int.from_bytes(kept[:_LENGTH_BYTES], "little")
        return kept[_LENGTH_BYTES : _LENGTH_BYTES + length]


def input_in_hand(report: Path) -> Path:
    """Where a process that writes this report keeps the input that it tries."""
    return report.with_suffix(".input")


class Tried:
    """Runs a target, and keeps count and findings."""

    def __init__(self, read: Callable[[bytes], int | None], report: Path, findings: Path) -> None:
        from fedmezo_core.errors import FedMezoError

        self._read = read
        self._refusal = FedMezoError
        self.report = report
        self._findings = findings
        self._found: dict[str, str] = {}
        self._said_s = 0.0
        self._current = InputInHand(input_in_hand(report))
        self.count = 0
        self.messages = 0
        """As many as the inputs held."""
        signal.signal(signal.SIGALRM, _hang)

    def one(self, data: bytes) -> None:
        """Try one input."""
        self._current.take(data)
        # Again each second: what swallows the first may not go on.
        signal.setitimer(signal.ITIMER_REAL, HANG_S, 1.0)
        messages: int | None = 1
        try:
            messages = self._read(data)
        except self._refusal:
            pass
        except Exception as error:
            self._keep(error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._current.take(b"")
        self.count += 1
        self.messages += messages or 1
        if time.monotonic() - self._said_s > REPORT_EVERY_S:
            self.say()

    def say(self) -> None:
        """Write the report; the engine's end may come without a word."""
        self._said_s = time.monotonic()
        report = {
            "executions": self.count,
            "messages": self.messages,
            "cpu_s": time.process_time(),
            "findings": list(self._found.values()),
        }
        self.report.write_text(json.dumps(report))

    def _keep(self, error: Exception, data: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
        if where in self._found or len(self._found) >= FINDINGS_MAX:
            return
        self._findings.mkdir(parents=True, exist_ok=True)
        path = self._findings / hashlib.sha256(data).hexdigest()[:12]
        path.write_bytes(data)
        self._found[where] = f"{where}: {str(error)[:200]} ({path})"
        traceback.print_exception(error)


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise HangError(f"an input took more than {HANG_S:g} s")


def without_coverage(tried: Tried, name: str, end_s: float, seed: int) -> None:
    """Change kept inputs again and again."""
    from tests.fuzz.corpus import inputs_of
    from tests.fuzz.mutations import mutated
    from tests.fuzz.targets import TARGETS

    rng, inputs = random.Random(seed), inputs_of(name)
    for data in inputs:
        tried.one(data)
    while time.monotonic() < end_s:
        tried.one(mutated(rng, TARGETS[name], rng.choice(inputs), inputs))


def with_coverage(atheris: Any, tried: Tried, name: str, seconds: float, seed: int) -> None:
    """Let atheris choose what to change; it ends the process."""
    from tests.fuzz.corpus import FOLDER, inputs_of
    from tests.fuzz.mutations import mutated
    from tests.fuzz.targets import TARGETS

    inputs = inputs_of(name)

    def mutate(data: bytes, size_max: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, len(data)))
        return mutated(rng, TARGETS[name], data, inputs)[:size_max]

    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", "-max_len=65536"]
    # No -timeout: libFuzzer has none beside another handler of the alarm.
    options += ["-verbosity=0", "-print_final_stats=0"]
    # The first folder gets what is new, and the kept inputs stay as they are.
    new = tried.report.with_suffix(".new")
    new.mkdir()
    atheris.Setup(
        [sys.argv[0], *options, str(new), str(FOLDER / name)], tried.one, custom_mutator=mutate
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.engine")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unguided", action="store_true", help="several times as fast")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    options = parser.parse_args()
    logging.disable()
    faulthandler.dump_traceback_later(options.seconds + LATE_S, exit=True)
    atheris = None
    with contextlib.suppress(ImportError):
        if options.unguided:
            raise ImportError
        import atheris  # type: ignore[no-redef]
    with _instrumented(atheris):
        from tests.fuzz.targets import TARGETS
    tried = Tried(TARGETS[options.target].read, options.report, options.findings)
    if atheris is not None:
        with_coverage(atheris, tried, options.target, options.seconds, options.seed)
    without_coverage(tried, options.target, time.monotonic() + options.seconds, options.seed)
    tried.say()


@contextlib.contextmanager
def _instrumented(atheris: Any) -> Iterator[None]:
    if atheris is None:
        yield
        return
    with atheris.instrument_imports(include=INSTRUMENTED):
        yield


if __name__ == "__main__":
    main()
