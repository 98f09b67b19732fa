"""What the package allows of its dependencies is what its environments test."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def _declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for one in lists for line in one]


def _pinned(file: str) -> dict[str, Version]:
    lines = (line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    return {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines)
    }


def test_lower_bounds_are_the_lowest_tested_versions() -> None:
    tested = _pinned("requirements-lowest.lock")
    for requirement in _declared():
        [bound] = [one.version for one in requirement.specifier if one.operator == ">="]
        found = tested[canonicalize_name(requirement.name)]
        assert found.release[:3] == (*Version(bound).release, 0, 0)[:3], requirement
