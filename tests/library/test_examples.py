"""The examples run as they are shown, and end with one digest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support.harness import ROOT, environment
from tests.integration.support.parties import write_rows

pytestmark = pytest.mark.slow


def output_of(example: str, model: Path, data: list[Path]) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, model, *data],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests_in(output: str) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{64}\b", output))


def test_the_loop_and_http_end_with_the_same_weights(
    model_folder: Path, data_files: list[Path]
) -> None:
    """Their runs have the same seed and data, and differ in name and transport."""
    loop = output_of("pytorch_loop.py", model_folder, data_files[:3])
    http = output_of("http_transport.py", model_folder, data_files[:3])
    assert "round 5" in loop
    assert "round 5, 3 workers" in http
    assert digests_in(loop) == digests_in(http)
    assert len(digests_in(loop)) == 1


def test_the_documented_program_runs_as_it_is_written(tmp_path: Path, model_folder: Path) -> None:
    page = (ROOT / "docs/library.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "my-model").symlink_to(model_folder)
    write_rows(tmp_path / "rows.jsonl", count=40)
    done = subprocess.run(
        [sys.executable, "-c", program + "assert len(coordinator.digests) == 1\n"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


def test_the_trainer_logs_evaluates_and_saves(model_folder: Path, data_files: list[Path]) -> None:
    output = output_of("huggingface_trainer.py", model_folder, data_files[:2])
    assert len(re.findall(r"'loss': ", output)) == 4
    assert len(re.findall(r"'eval_loss': ", output)) == 2
    assert "round 4, 2 workers" in output
    for name in ("final/model", "w0/trainer-2", "w0/trainer-4", "w1/trainer-2", "w1/trainer-4"):
        assert f"'{name}.safetensors'" in output
    assert len(digests_in(output)) == 1
