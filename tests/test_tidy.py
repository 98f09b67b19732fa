"""House rules that a linter cannot express. The suite fails when the tree is untidy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fedmezo_proto": ROOT / "proto/fedmezo_proto",
    "fedmezo_core": ROOT / "fedmezo_core",
    "fedmezo_coordinator": ROOT / "coordinator/fedmezo_coordinator",
    "fedmezo_worker": ROOT / "worker/fedmezo_worker",
}
# Who may import whom. The coordinator and the worker meet only on the wire.
MAY_IMPORT = {
    "fedmezo_proto": {"fedmezo_proto"},
    "fedmezo_core": {"fedmezo_core", "fedmezo_proto"},
    "fedmezo_coordinator": {"fedmezo_coordinator", "fedmezo_core", "fedmezo_proto"},
    "fedmezo_worker": {"fedmezo_worker", "fedmezo_core", "fedmezo_proto"},
}
# The machines, and what they decide with, know no clock, socket, disk, thread or entropy.
PURE = (
    "aggregate",
    "answers",
    "backoff",
    "catch_up",
    "cohort",
    "config",
    "digests",
    "events",
    "records",
    "relay",
    "rounds",
    "session",
    "snapshots",
)
IMPURE = {
    "asyncio", "datetime", "grpc", "io", "logging", "numpy", "os", "pathlib", "random", "secrets",
    "socket", "subprocess", "threading", "time", "torch",
}  # fmt: skip
NUMERIC = {"torch", "numba", "numpy", "triton", "transformers", "peft", "accelerate"}
GRPC_MODULES = {"fedmezo_core/wire/client.py", "coordinator/fedmezo_coordinator/serving/service.py"}
# Ways of reading data that can run code.
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"torch.load", "eval", "exec"}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield package, path, ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    """Roots of every import, also inside functions."""
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def test_dependency_directions() -> None:
    for package, path, tree in sources():
        ours = imported(tree) & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{path} imports {ours - MAY_IMPORT[package]}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    tree = ast.parse((ROOT / f"fedmezo_core/{name}.py").read_text())
    assert not imported(tree) & IMPURE


def test_numerics_live_below_zo_only() -> None:
    for package, path, tree in sources():
        if package != "fedmezo_core" or path.is_relative_to(ROOT / "fedmezo_core/zo"):
            continue
        assert not imported(tree) & NUMERIC, path


def test_grpc_is_imported_at_the_border_only() -> None:
    for _, path, tree in sources():
        if "grpc" in imported(tree):
            assert str(path.relative_to(ROOT)) in GRPC_MODULES


def test_nothing_that_can_run_code_reads_data() -> None:
    for _, path, tree in sources():
        assert not imported(tree) & UNSAFE_IMPORTS, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", ["proto", "coordinator", "worker"])
def test_generic_folders_are_not_packages(folder: str) -> None:
    """`import worker` must never find our code: PyPI has a `worker`."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_serving_needs_no_torch() -> None:
    """What the daemon imports, in a fresh interpreter."""
    code = (
        "import sys, fedmezo_coordinator.programs.coordinator_command, fedmezo_coordinator.programs.fedmezo_command, "
        "fedmezo_coordinator.programs.relay_command; "
        f"loaded = set(sys.modules) & {NUMERIC!r}; assert not loaded, loaded"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(str(folder.parent) for folder in PACKAGES.values())},
    )


def test_no_leftovers() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for _, path, _tree in sources():
        assert not marks.search(path.read_text()), path
