"""What the package allows of its dependencies is what its environments test."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
STACKS = {"flower", "nvflare"}
"""Extras that need newer versions than the lowest; their tests run with those of `make test`."""


RUNTIMES = {"onnx", "llama-cpp"}
"""Extras of workers without torch, which need newer versions than the lowest."""

TOOLS = {"otel", "tensorboard"}
"""Extras that only other tools read; their tests run with those of `make test`."""


def _declared() -> dict[str, list[Requirement]]:
    """What the package needs, by extra; empty for the package alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in extras.items()}


def _pinned(file: str) -> dict[str, Version]:
    lines = (line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    return {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines)
    }


def test_lower_bounds_are_the_lowest_tested_versions() -> None:
    tested = _pinned("requirements-lowest.lock")
    declared = _declared()
    kept = declared.keys() - STACKS - RUNTIMES - TOOLS
    for requirement in [one for extra in kept for one in declared[extra]]:
        [bound] = [one.version for one in requirement.specifier if one.operator == ">="]
        found = tested[canonicalize_name(requirement.name)]
        assert found.release[:3] == (*Version(bound).release, 0, 0)[:3], requirement


def test_both_stacks_are_pinned_within_the_range_that_the_package_allows() -> None:
    tested = _pinned("requirements.lock")
    for name in STACKS:
        [requirement] = _declared()[name]
        assert tested[requirement.name] in requirement.specifier


def test_every_pinned_version_installs_on_the_oldest_python() -> None:
    """Debian 12 has 3.11.2, and some packages ask for a later patch release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [oldest] = SpecifierSet(project["requires-python"])
    wrong = {}
    for name in _pinned("requirements.lock"):
        try:
            needed = metadata.metadata(name)["Requires-Python"]
        except metadata.PackageNotFoundError:
            continue  # Of another platform, or of a group that is not installed here.
        if needed and f"{oldest.version}.2" not in SpecifierSet(needed):
            wrong[name] = needed
    assert not wrong
