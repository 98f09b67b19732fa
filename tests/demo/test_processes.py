"""The demo's child processes end with it, whatever happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.demo.processes import Child, Processes

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_second_ctrl_c_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    wait = process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(process, "wait", interrupted)
    processes = Processes(tmp_path, children=[Child("deaf", tmp_path / "log", process)])
    with pytest.raises(KeyboardInterrupt), processes:
        raise KeyboardInterrupt
    assert process.poll() is not None
    process.stdout.close()
