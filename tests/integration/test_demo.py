"""The demo as a user runs it on files of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.support.harness import PATIENCE_S, ROOT
from tests.integration.support.parties import write_rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_ended_leaves_no_process_behind(
    number: signal.Signals, model_folder: Path, tmp_path: Path
) -> None:
    """Also when its terminal is closed."""
    write_rows(tmp_path / "a.train.jsonl")
    write_rows(tmp_path / "heldout.jsonl")
    sources = [ROOT, *(ROOT / name for name in ("proto", "coordinator", "worker"))]
    demo = subprocess.Popen(
        [sys.executable, "-m", "deploy.demo", "--model", str(model_folder), "--data", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        children: list[psutil.Process] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while len(children) < 2:
            assert time.monotonic() < deadline_s
            assert demo.poll() is None
            children = psutil.Process(demo.pid).children(recursive=True)
            time.sleep(0.05)
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=PATIENCE_S)
        assert demo.returncode == 130, said
        assert b"Traceback" not in said
        assert not any(child.is_running() for child in children)
    finally:
        demo.kill()
