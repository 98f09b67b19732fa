"""The demo as a user runs it on files of their own."""

from __future__ import annotations

import json
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

SOURCES = [ROOT, *(ROOT / name for name in ("proto", "coordinator", "worker"))]


def start_demo(model: Path, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The demo on `model` and the rows in `folder`, where it also writes its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.demo", "--model", str(model), "--data", ".", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.timeout(600)
def test_a_users_own_model_and_data_from_the_fit_to_the_export(
    model_folder: Path, tmp_path: Path
) -> None:
    for skew, name in enumerate(("a", "b")):
        write_rows(tmp_path / f"{name}.train.jsonl", skew=skew, count=40)
    write_rows(tmp_path / "heldout.jsonl", count=10)
    demo = start_demo(model_folder, tmp_path, "--rounds", "4")
    try:
        # Six processes import torch, one after the other or at the same time.
        output, _ = demo.communicate(timeout=3 * PATIENCE_S)
    finally:
        # So that it ends its own processes, too.
        demo.terminate()
        demo.wait()
    said = output.decode()
    flowing = " ".join(said.split())
    assert demo.returncode == 0, said
    assert "2 workers (a, b)" in flowing
    assert "Fitted an adapter of rank 4 on transformer.h.0.mlp.c_fc" in flowing
    assert "set aside from the workers' rows" in flowing
    assert "chose the learning rate 0." in flowing
    told = said[: said.index("Take the model home")]
    assert max(map(len, told.splitlines())) <= 80
    assert "round 4/4" in said
    assert "All parties hold the same weights" in flowing
    # Results on another model and other data don't compare.
    assert "back-propagation" not in said
    assert (tmp_path / "build/demo/demo.png").exists()
    figures = json.loads((tmp_path / "build/reports/demo.json").read_text())
    values = {figure["name"]: figure["value"] for figure in figures}
    assert values["parties whose final digests are equal"] == 3
    assert values["CPU time of all processes"] > 0

    [final] = {line.split()[-1] for line in said.splitlines() if line.split()[:1] == ["replica"]}
    export = said[said.index("export ") :].replace("\\\n", " ").split()
    command = "fedmezo_coordinator.programs.fedmezo_command"
    for more in ((), ("--adapter-only",)):
        exported = subprocess.run(
            [sys.executable, "-m", command, export[0], f"out{len(more)}", *export[2:], *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES))},
            capture_output=True,
            timeout=PATIENCE_S,
        )
        assert exported.returncode == 0, exported.stderr
        assert final in exported.stdout.decode()
    assert (tmp_path / "out0/model.safetensors").exists()
    assert (tmp_path / "out1/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "running"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM during the fit"),
        pytest.param(signal.SIGTERM, 2, id="SIGTERM during the run"),
        pytest.param(signal.SIGINT, 2, id="Ctrl-C during the run"),
        pytest.param(signal.SIGHUP, 2, id="SIGHUP, as of a closed terminal"),
    ],
)
def test_a_demo_that_is_ended_leaves_no_process_behind(
    number: signal.Signals, running: int, model_folder: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "a.train.jsonl")
    write_rows(tmp_path / "heldout.jsonl")
    demo = start_demo(model_folder, tmp_path)
    try:
        children: list[psutil.Process] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while len(children) < running:
            assert time.monotonic() < deadline_s
            assert demo.poll() is None
            children = psutil.Process(demo.pid).children(recursive=True)
            time.sleep(0.05)
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=PATIENCE_S)
        assert demo.returncode == 130, said
        assert b"Traceback" not in said
        [told] = [line for line in said.splitlines() if line.startswith(b"demo: ")]
        assert b"all its processes have ended; run the same command again" in told
        assert not any(child.is_running() for child in children)
    finally:
        demo.kill()
