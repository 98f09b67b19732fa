"""What `import fedmezo` gives: a small set, documented and typed, that loads nothing by itself."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fedmezo
from tests.test_tidy import NUMERIC, PACKAGES, ROOT

SOURCE = Path(fedmezo.__file__)


def test_the_surface_is_listed_once() -> None:
    """A new name is a promise: it belongs into this list on purpose."""
    assert sorted(fedmezo.__all__) == [
        "Aggregator",
        "Committed",
        "Coordinator",
        "Engine",
        "Evaluated",
        "FedMezoError",
        "Genesis",
        "JournalStore",
        "Measure",
        "MeasureFailed",
        "Measured",
        "MeasurementError",
        "Objective",
        "Predictions",
        "RestoringEngine",
        "RunConfig",
        "RunPolicy",
        "SavingEngine",
        "Scalars",
        "SeedPolicy",
        "Session",
        "SumMemory",
        "TorchEngine",
        "UnavailableError",
        "begin_run",
        "coefficients_of",
        "decode_genesis",
        "digest64_of",
        "encode_genesis",
        "load_objective",
        "materialize",
        "measure",
        "parse_run",
        "seeds_of",
    ]


def test_type_checkers_see_the_names_that_are_there() -> None:
    for package in ("fedmezo", "fedmezo_core", "fedmezo_proto"):
        assert (PACKAGES[package] / "py.typed").exists()
    homes = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.asname
    }
    assert homes == fedmezo._HOMES
    for name, module in homes.items():
        found = getattr(fedmezo, name)
        assert found.__name__ == name
        assert found.__module__ == module, f"{name} is defined in {found.__module__}"
    assert set(fedmezo.__all__) <= set(dir(fedmezo))
    with pytest.raises(AttributeError, match="no attribute 'Coordinater'"):
        _ = fedmezo.Coordinater


@pytest.mark.parametrize("name", fedmezo.__all__)
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(fedmezo, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing) and thing.__module__.startswith("fedmezo."):
        for member, value in vars(thing).items():
            if not member.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_every_name_is_in_the_documents() -> None:
    page = (ROOT / "docs/library.md").read_text()
    assert not [name for name in fedmezo.__all__ if f"`{name}`" not in page]


@pytest.mark.parametrize(
    "used",
    ["", "; fedmezo.Coordinator; fedmezo.Session; fedmezo.Engine; fedmezo.parse_run"],
    ids=["import", "both sides"],
)
def test_it_loads_nothing_that_was_not_asked_for(used: str) -> None:
    unwanted = NUMERIC | {"grpc", "apsw"}
    code = (
        f"import sys; import fedmezo{used}; "
        f"loaded = set(sys.modules) & {unwanted!r}; assert not loaded, loaded"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(str(folder.parent) for folder in PACKAGES.values())},
    )
