"""strace kills a child that appends to a journal, or fails it, at chosen system calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.appender import NAME
from tests.integration.support.harness import ROOT, environment

CALLS: Final = ("pwrite64", "fdatasync", "fsync")
"""What the store writes and syncs with on Linux."""
OTHERS: Final = ("ftruncate", "unlink")
"""What else it changes files with."""
UNUSED: Final = ("pwritev", "writev", "sync_file_range", "fallocate", "rename", "msync")
"""What it could change files with, but does not."""
KINDS: Final = ("SIGKILL", "EIO", "ENOSPC")


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call of a name, counted from 1; 0: nothing happens."""

    call: str
    number: int
    kind: str
    """`SIGKILL`, or an error's name; `EIO+` for that call and all later ones."""

    def __str__(self) -> str:
        return f"{self.kind} at {self.call} {self.number}"

    @property
    def inject(self) -> str:
        """As strace wants it."""
        when = f"{self.number}+" if self.kind.endswith("+") else str(self.number)
        kind = self.kind.rstrip("+")
        what = f"signal={kind}" if kind.startswith("SIG") else f"error={kind}"
        return f"inject={self.call}:{what}:when={when}"


@dataclass(frozen=True)
class Outcome:
    """What a child did, in order."""

    status: int
    """Its exit status, negative if a signal ended it."""
    calls: Sequence[str]
    """Names of the calls, with `failed:` before those that an error was injected into, `folder:`
    before those on a folder, and `said:` before a word that the child wrote."""
    acknowledged: int
    """Rows that were said to be durable."""

    def count(self, call: str) -> int:
        """How often a call was made."""
        return sum(name.rpartition(":")[2] == call for name in self.calls)

    @property
    def after_failure(self) -> Sequence[str]:
        """What was done after the first injected error, which is the first of them."""
        for number, call in enumerate(self.calls):
            if call.startswith("failed:"):
                return self.calls[number:]
        return ()


def why_not() -> str:
    """Why nothing can be injected here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed, so no system call can be made to fail"
    probe = subprocess.run(
        ["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, text=True, check=False
    )
    return "" if probe.returncode == 0 else f"ptrace is not allowed here: {probe.stderr.strip()}"


class Children:
    """A process that has imported everything, and forks a child for each fault."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def append_under(self, fault: Fault, folder: Path) -> Outcome:
        """Let a child append to the journal in `folder` with one fault."""
        os.mkfifo(folder / "go")
        pid = self._exchange(f"{folder}\n")
        log = folder / "calls"
        with _strace(fault, pid, log) as strace:
            (folder / "go").write_bytes(b"go")
            status = self._exchange("")
            strace.wait()
        calls = [call for line in _whole_lines(log.read_text()) if (call := _call_in(line))]
        acknowledged = re.findall(r"acknowledged (\d+)", (folder / "said").read_text())
        for name in ("go", "calls", "said"):
            (folder / name).unlink()
        return Outcome(status, calls, int(acknowledged[-1]) if acknowledged else 0)

    def _exchange(self, text: str) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(text)
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@contextmanager
def children() -> Iterator[Children]:
    """Start what forks children; it ends with the context."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.appender"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    with server:
        yield Children(server)
        assert server.stdin is not None
        server.stdin.close()


def _strace(fault: Fault, pid: int, log: Path) -> subprocess.Popen[str]:
    """strace, attached to the child."""
    watched = ",".join((*CALLS, *OTHERS, *UNUSED, "write"))
    options = ["-f", "-y", "-o", str(log), "-e", f"trace={watched}", "-e", "signal=none"]
    if fault.number:
        options += ["-e", fault.inject]
    strace = subprocess.Popen(
        ["strace", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    for line in strace.stderr:
        if "attached" in line:
            return strace
    raise AssertionError(f"strace did not attach to {pid}")


def _whole_lines(log: str) -> Iterator[str]:
    """The lines of strace's log; it breaks one in which another thread does something."""
    begun: dict[str, str] = {}
    for line in log.splitlines():
        thread, _, what = line.partition(" ")
        if what.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif what.lstrip().startswith("<... ") and thread in begun:
            yield begun.pop(thread) + what.partition(" resumed>")[2]
        else:
            yield line


def _call_in(line: str) -> str:
    """A line of strace's as `Outcome` has it; empty if it is about something else."""
    said = re.match(r'\d+ +write\([^,]*/said>, "(\w+)', line)
    if said:
        return f"said:{said[1]}"
    call = re.match(r"\d+ +(\w+)\((?:\d+<([^>]*)>)?", line)
    if call is None:
        return ""
    failed = "failed:" if "(INJECTED)" in line else ""
    on_folder = "folder:" if call[2] and NAME not in call[2] else ""
    return f"{failed}{on_folder}{call[1]}"
