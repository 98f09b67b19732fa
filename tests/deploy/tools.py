"""The tools that check what is in `deploy/`; `make test-deploy` installs them for themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = os.environ.get("FEDMEZO_TEST_DEPLOY", "")
"""The folder of the tools' commands; empty: they are not installed, and their tests are skipped."""

needs_tools = pytest.mark.skipif(not TOOLS, reason="make test-deploy installs what this takes")


def tool(name: str) -> str:
    """The command of that name, of the system or of the tools; skips the test if there is none."""
    found = shutil.which(name, path=os.pathsep.join([TOOLS, os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"there is no {name} here")
    return found


def output_of(*command: str | Path, status: int = 0, **options: object) -> str:
    """What a command says; fails if it ends with another status."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == status, done.stdout
    return str(done.stdout)
