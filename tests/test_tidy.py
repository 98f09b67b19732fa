"""House rules that a linter cannot express. The suite fails when the tree is untidy."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fedmezo_proto": ROOT / "proto/fedmezo_proto",
    "fedmezo_core": ROOT / "fedmezo_core",
    "fedmezo": ROOT / "fedmezo",
    "fedmezo_coordinator": ROOT / "coordinator/fedmezo_coordinator",
    "fedmezo_worker": ROOT / "worker/fedmezo_worker",
    "fedmezo_flower": ROOT / "integrations/fedmezo_flower",
    "fedmezo_nvflare": ROOT / "integrations/fedmezo_nvflare",
}
CODE_FOLDERS = (
    *(str(folder.relative_to(ROOT)) for folder in PACKAGES.values()),
    "benchmarks",
    "deploy",
    "examples",
    "experiments",
    "tests",
)
# Who may import whom. The coordinator and the worker meet only on the wire.
MAY_IMPORT = {
    "fedmezo_proto": {"fedmezo_proto"},
    "fedmezo_core": {"fedmezo_core", "fedmezo_proto"},
    "fedmezo": {"fedmezo", "fedmezo_core", "fedmezo_proto"},
    "fedmezo_coordinator": {"fedmezo_coordinator", "fedmezo", "fedmezo_core", "fedmezo_proto"},
    "fedmezo_worker": {"fedmezo_worker", "fedmezo", "fedmezo_core", "fedmezo_proto"},
    "fedmezo_flower": {
        "fedmezo_flower",
        "fedmezo_worker",
        "fedmezo_coordinator",
        "fedmezo",
        "fedmezo_core",
    },
    "fedmezo_nvflare": {
        "fedmezo_nvflare",
        "fedmezo_worker",
        "fedmezo",
        "fedmezo_core",
        "fedmezo_proto",
    },
}
# The core, lowest first: a module imports from its own layer and from those before it.
CORE_LAYERS = (
    "fedmezo_core",
    "fedmezo_core.journal",
    "fedmezo_core.trust",
    "fedmezo_core.machines",
    "fedmezo_core.wire",
    "fedmezo_core.zo",
)
# Folders and modules that know no clock, socket, disk, thread or entropy.
PURE = (
    "machines", "config.py", "errors.py", "events.py", "records.py", "trust/authorisation.py",
    "trust/members.py", "trust/join_string.py", "trust/secure_aggregation",
)  # fmt: skip
IMPURE = {
    "asyncio", "datetime", "grpc", "io", "logging", "numpy", "os", "pathlib", "random", "secrets",
    "socket", "subprocess", "threading", "time", "torch",
}  # fmt: skip
NUMERIC = {"torch", "numba", "numpy", "triton", "transformers", "peft", "accelerate"}
GRPC_MODULES = {
    "fedmezo_core/wire/client.py",
    "fedmezo_core/wire/enrolment.py",
    "coordinator/fedmezo_coordinator/conformance/raw_calls.py",
    "coordinator/fedmezo_coordinator/conformance/scripted_server.py",
    "coordinator/fedmezo_coordinator/serving/service.py",
}
COMMANDS = "fedmezo_coordinator.programs"
CORE_ENTRIES_MAX = 14
MODULES_IN_A_FOLDER_MAX = 14
# Ways of reading data that can run code.
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"torch.load", "eval", "exec"}


@functools.cache
def sources() -> tuple[tuple[str, Path, ast.Module], ...]:
    """Package, path and syntax of every module that a person wrote."""
    return tuple(
        (package, path, ast.parse(path.read_text()))
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    )


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


def module_of(path: Path) -> str:
    """Dotted name of a module of ours; a package's name for its `__init__`."""
    for package, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise AssertionError(f"{path} is in no package of ours")


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, also inside functions."""
    modules = {module_of(path): tree for _, path, tree in sources()}
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (names & modules.keys()) or {node.module}
        graph[module] = {name for name in found if name in modules and name != module}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Every name that lies on a circle, or between two of them."""
    left = set(graph)
    while True:
        imported_by_left = set().union(*(graph[name] for name in left)) if left else set()
        ends = {name for name in left if not graph[name] & left or name not in imported_by_left}
        if not ends:
            return sorted(left)
        left -= ends


def room_of(module: str) -> str:
    """The folder of a module; a package, or a module at its top or at `zo`'s, is its own room.

    A program's commands may lie in folders below it, and are in its room.
    """
    if module.startswith(COMMANDS + "."):
        return COMMANDS
    folder = module.rpartition(".")[0]
    return module if folder in {"", *PACKAGES, "fedmezo_core.zo"} else folder


def test_no_circle_of_imports() -> None:
    graph = import_graph()
    assert not (found := circle_in(graph)), f"modules that import each other: {found}"
    rooms: dict[str, set[str]] = {}
    for module, imports in graph.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, imports))
    for room, imports in rooms.items():
        imports.discard(room)
    assert not (found := circle_in(rooms)), f"rooms that import each other: {found}"


def layer_of(module: str) -> int:
    return max(n for n, layer in enumerate(CORE_LAYERS) if f"{module}.".startswith(f"{layer}."))


def test_nothing_in_the_core_imports_upwards() -> None:
    for module, imports in import_graph().items():
        for other in imports:
            if module.startswith("fedmezo_core.") and other.startswith("fedmezo_core."):
                assert layer_of(other) <= layer_of(module), f"{module} imports {other}"


def test_the_journal_knows_no_machine() -> None:
    """Also not by a detour; and a client of a coordinator loads no machine either."""
    graph = import_graph()
    for start in graph:
        if room_of(start) != "fedmezo_core.journal" and start != "fedmezo_core.wire.client":
            continue
        reached: set[str] = set()
        left = [start]
        while left:
            for other in graph[left.pop()] - reached:
                reached.add(other)
                left.append(other)
        machines = {m for m in reached if m.startswith("fedmezo_core.machines.")}
        assert not machines, f"{start} reaches {sorted(machines)}"


@pytest.mark.parametrize("name", PURE)
def test_what_decides_does_no_io(name: str) -> None:
    found = ROOT / "fedmezo_core" / name
    for path in found.rglob("*.py") if found.is_dir() else [found]:
        assert not imported(ast.parse(path.read_text())) & IMPURE, path


def test_folders_are_small_enough_to_read() -> None:
    kept = [
        p for p in (ROOT / "fedmezo_core").iterdir() if p.name not in ("__pycache__", "py.typed")
    ]
    assert len(kept) <= CORE_ENTRIES_MAX
    counts = Counter(
        path.parent
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__init__"
    )
    crowded = {str(f): n for f, n in counts.items() if n > MODULES_IN_A_FOLDER_MAX}
    assert not crowded


def test_no_two_modules_share_a_name() -> None:
    names = Counter(
        path.stem
        for folder in CODE_FOLDERS
        if folder != "tests"
        for path in (ROOT / folder).rglob("*.py")
        if not path.stem.startswith("__")
    )
    shared = [name for name, count in names.items() if count > 1]
    assert not shared


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


@pytest.mark.parametrize("folder", ["proto", "coordinator", "worker", "integrations"])
def test_generic_folders_are_not_packages(folder: str) -> None:
    """`import worker` must never find our code: PyPI has a `worker`."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_serving_needs_no_torch() -> None:
    """What the daemon imports, in a fresh interpreter."""
    code = (
        "import sys; from fedmezo_coordinator.programs import coordinator_command, "
        "fedmezo_command, relay_command; "
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
