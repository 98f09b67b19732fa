"""The Dockerfiles: a linter's view, the settings in them, and the steps that make an image."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, RelaySettings
from fedmezo_worker.worker_settings import WorkerSettings
from tests.deploy.tools import DEPLOY, ROOT, needs_tools, output_of, tool

FILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
KINDS: dict[str, type[BaseSettings]] = {
    "COORDINATOR": CoordinatorSettings,
    "RELAY": RelaySettings,
    "WORKER": WorkerSettings,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    assert output_of(tool("hadolint"), file) == ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_it_sets_are_settings_and_nobody_is_root(file: Path) -> None:
    text = file.read_text()
    for program, key in re.findall(r"FEDMEZO_([A-Z]+)_([A-Z_]+)=", text):
        assert key.lower() in KINDS[program].model_fields
    assert re.findall(r"^USER (.*)", text, re.MULTILINE)[-1] == "65532:65532"
    assert "HEALTHCHECK" in text
    assert "--start-interval" not in text, "Podman, Buildah and Docker before 25 do not know it"
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)", text, re.MULTILINE):
        assert re.search(r":\d+\.\d+", image), f"{image} is not pinned"


def test_everything_that_a_wheel_is_made_of_reaches_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert any(package == one or package.startswith(f"{one}/") for one in allowed), package


@needs_tools
@pytest.mark.timeout(900)
def test_the_steps_of_the_coordinators_image_make_it_without_torch(tmp_path: Path) -> None:
    """In an empty folder instead of an empty image."""
    text = (DEPLOY / "docker/coordinator.Dockerfile").read_text()
    stage = text[text.index(" AS build\n") : text.index(" AS build-replica\n")]
    [step] = re.findall(r"^RUN ((?:.*\\\n)*.*)", stage, re.MULTILINE)
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, target = ROOT / line[1:], tmp_path / "build" / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
    made = tmp_path / "opt"
    step = step.replace("/opt/fedmezo", str(made)).replace(
        "python -m venv", f"{sys.executable} -m venv"
    )
    output_of("sh", "-euc", step, cwd=tmp_path / "build", timeout=800)
    for program in ("fedmezo", "fedmezo-coordinator", "fedmezo-relay"):
        assert output_of(made / "bin" / program, "--version").startswith(program)
    assert not list(made.glob("lib/*/site-packages/torch"))
    size_mb = sum(file.lstat().st_size for file in made.rglob("*")) / 1e6
    print(f"the coordinator's packages take {size_mb:.0f} MB")
    assert size_mb < 200
