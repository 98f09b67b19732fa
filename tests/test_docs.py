"""The README and the commands say the same things."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, RelaySettings
from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_worker.worker_settings import WorkerSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    group = typer.main.get_command(app)
    names: list[str] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", {})
        names += [f"{name} {child}" for child in children] or [name]
    for name in names:
        assert f"fedmezo {name}" in README


def test_every_make_target_of_the_readme_exists_and_the_other_way_round() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert targets - {"help"} == named & targets, (targets, named)
    assert named <= targets


def test_the_annotated_tree_names_what_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    paths = re.findall(r"^([\w./-]+)", tree, flags=re.MULTILINE)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), f"the README's tree names {path}, which is not there"


def test_every_module_is_in_the_annotated_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for folder in (
        "fedmezo_core",
        "fedmezo_core/zo",
        "coordinator/fedmezo_coordinator",
        "worker/fedmezo_worker",
    ):
        for path in (ROOT / folder).glob("*.py"):
            if not path.stem.startswith("__"):
                assert f"{folder}/{path.name}" in tree, f"{folder}/{path.name} is missing"


def test_every_document_is_linked() -> None:
    linked = README + "".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.name in linked, f"nothing links to {path}"


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for model in (
        RunConfig,
        TaskConfig,
        LoraConfig,
        CoordinatorSettings,
        RelaySettings,
        WorkerSettings,
    ):
        for name in model.model_fields:
            assert f"`{name}`" in text, f"{model.__name__}.{name} is not in docs/configuration.md"
