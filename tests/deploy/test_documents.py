"""The page about deployment names every file that there is, and what it names is there."""

from __future__ import annotations

import re
import subprocess

from tests.deploy.tools import DEPLOY, ROOT

PAGE = (ROOT / "docs/deployment.md").read_text()


def test_every_file_is_named() -> None:
    files = {file.relative_to(ROOT).as_posix() for file in DEPLOY.rglob("*") if file.is_file()}
    for file in sorted(files):
        if "/demo/" in file or "__pycache__" in file:
            continue
        named = "deploy/helm/fedmezo/" if "/helm/" in file else file
        assert f"{named}" in PAGE, f"docs/deployment.md does not name {file}"


def test_every_path_and_flag_of_a_script_is_there() -> None:
    for path in re.findall(r"deploy/[\w./-]+", PAGE):
        assert (ROOT / path.rstrip(".")).exists(), path
    said = subprocess.run(
        ["sh", str(DEPLOY / "edge/install.sh"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    section = PAGE.split("## A device at the edge")[1].split("\n## ")[0]
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", section):
        assert flag in said, flag
