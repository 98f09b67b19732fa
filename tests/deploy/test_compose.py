"""The compose files: their services start programs with settings that those take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, InitSettings
from fedmezo_core.layered_settings import load_settings
from fedmezo_worker.worker_settings import WorkerSettings
from tests.deploy.tools import DEPLOY

yaml = pytest.importorskip("yaml")

FILES = sorted((DEPLOY / "compose").glob("*.yaml"))


def services_of(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["services"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_service_has_an_image_that_can_be_built_and_settings_that_are_allowed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, service in services_of(file).items():
        if "build" not in service:
            assert re.fullmatch(r"[a-z]+:\d+\.\d+\S*", service["image"]), service["image"]
            continue
        dockerfile = DEPLOY.parent / service["build"]["dockerfile"]
        if target := service["build"].get("target"):
            assert f" AS {target}\n" in dockerfile.read_text()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        with monkeypatch.context() as patch:
            for key, value in service.get("environment", {}).items():
                patch.setenv(key, _here(value))
            arguments = [_here(one) for one in service.get("command", [])]
            if arguments[:1] == ["init"]:
                load_settings(InitSettings, arguments[1:], program="init")
            elif "worker" in dockerfile.name:
                assert load_settings(WorkerSettings, arguments, program=name).name == name
            else:
                read = load_settings(CoordinatorSettings, arguments, program=name)
                read.run_config("[run]")
                assert read.standby is (file.stem == "fleet")


def _here(value: str) -> str:
    """A value with its variables filled in, and the file of settings where it lies here."""
    filled = re.sub(r"\$\{[A-Z_]+:?[?-][^}]*\}", "some", value)
    return filled.replace("/etc/fedmezo/run.toml", str(DEPLOY / "compose/run.toml"))


def test_the_fleet_shares_what_both_coordinators_need() -> None:
    services = services_of(DEPLOY / "compose/fleet.yaml")
    one, other = services["coordinator"], services["standby"]
    assert one["volumes"] == other["volumes"]
    assert one["environment"] == other["environment"]
