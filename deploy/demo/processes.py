"""Coordinator and workers as child processes on this machine: started, watched, stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedmezo_core.errors import FedMezoError

STOP_TIMEOUT_S = 20.0


class ChildError(FedMezoError):
    """A child process ended that should not have."""


@dataclass
class Child:
    """One process and the file that its output goes to."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def last_line(self) -> str:
        """What it said last."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass
class Processes:
    """Use it as a context manager: leaving it stops every process, and a second Ctrl-C at once."""

    folder: Path
    address: str = ""
    children: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Choose a free port on loopback."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"

    def start(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Start `python -m module arguments`; its output goes to `<name>.log` in the folder."""
        log = self.folder / f"{name}.log"
        # One thread for each process: five of them share the cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.children.append(Child(name, log, process))

    def run(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Run such a process to its end; raises `ChildError` if it fails."""
        self.start(name, module, arguments)
        self.children[-1].process.wait()
        self.check()
        self.children.pop()

    def check(self) -> None:
        """Raise if a process has failed."""
        for child in self.children:
            if child.process.poll():
                raise ChildError(
                    f"{child.name} ended with status {child.process.returncode}: "
                    f"{child.last_line()} (all of it is in {child.log})"
                )

    def wait_workers(self) -> None:
        """Wait until every process but the first, the coordinator, has ended by itself."""
        for child in self.children[1:]:
            child.process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            for child in self.children:
                if child.process.poll() is None:
                    child.process.terminate()
            for child in self.children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(STOP_TIMEOUT_S)
        finally:
            for child in self.children:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
