"""The worker in TypeScript: its own tests, the battery, and a run with a worker of ours."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.harness import (
    PATIENCE_S,
    ROOT,
    Programs,
    environment,
    run_values,
    toml_of,
)

FOLDER = ROOT / "integrations" / "typescript"
FEDMEZO = (sys.executable, "-m", "fedmezo_coordinator.programs.fedmezo_command")
ROUNDS = 6


def contract(**changes: Any) -> dict[str, Any]:
    """A run that the worker in TypeScript can do, without the model's name."""
    values = run_values(
        **{
            "rounds": 60,
            "local_steps": 1,
            "workers_min": 1,
            "quorum": 1,
            "probes": 4,
            "estimator": "one_sided",
            "distribution": "low_rank_1",
            "report_losses": True,
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True},
        }
        | changes
    )
    del values["model"]
    return values


@pytest.fixture(scope="module")
def node() -> str:
    """Node, with the worker built."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("there is no node here: install Node 20 or newer")
    if not (FOLDER / "node_modules").is_dir():
        pytest.skip("integrations/typescript has no packages: run `make test-typescript`")
    subprocess.run(["npm", "run", "build"], cwd=FOLDER, check=True, timeout=PATIENCE_S)
    return found


@pytest.fixture(scope="module")
def prepared(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, a coordinator's file, and the ONNX form of the base."""
    pytest.importorskip("onnx", reason="there is no exporter here: install fedmezo[onnx]")
    from tests.integration.support.parties import save_model, write_rows

    folder = tmp_path_factory.mktemp("typescript")
    save_model(folder / "tiny")
    write_rows(folder / "rows.jsonl")
    settings = {"model": str(folder / "tiny"), "run": contract()}
    (folder / "coordinator.toml").write_text(toml_of(settings))
    subprocess.run(
        [*FEDMEZO, "export-form", folder / "form", "--config", folder / "coordinator.toml"],
        env=environment(),
        check=True,
        timeout=PATIENCE_S * 2,
    )
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.end()


def command(node: str, folder: Path, address: str, name: str, *more: str) -> list[str]:
    """Starts a worker in TypeScript."""
    return [
        *(node, str(FOLDER / "dist" / "src" / "main.js"), "--coordinator", address),
        *("--name", name, "--data", str(folder / "rows.jsonl")),
        *("--form", str(folder / "form"), *more),
    ]


def test_its_own_tests_pass(node: str) -> None:
    """It does what docs/vectors say, layer by layer."""
    tested = subprocess.run(
        [node, "--test", *sorted((FOLDER / "dist" / "test").glob("*.test.js"))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert tested.returncode == 0, tested.stdout
    assert int(re.findall(r"^# pass (\d+)$", tested.stdout, re.MULTILINE)[0]) > 40


@pytest.mark.parametrize("transport", [(), ("--polls",)], ids=["stream", "polls"])
def test_it_passes_the_battery(node: str, prepared: Path, transport: tuple[str, ...]) -> None:
    tested = subprocess.run(
        [
            *(*FEDMEZO, "conformance", "worker", "--config", prepared / "coordinator.toml"),
            *("--data", prepared / "rows.jsonl"),
            *("--start", shlex.join(command(node, prepared, "{address}", "w1", *transport))),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 4,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "smallest correlation with our projected gradients" in tested.stdout


@pytest.mark.parametrize("listed", [False, True], ids=["any form", "a listed form"])
async def test_it_ends_a_run_with_the_digest_of_our_worker(
    node: str, prepared: Path, programs: Programs, tmp_path: Path, listed: bool
) -> None:
    run = contract(rounds=ROUNDS, workers_min=2, quorum=2, digest_every_rounds=2)
    if listed:
        form = hashlib.sha256((prepared / "form" / "form.json").read_bytes()).hexdigest()
        run["base_forms"] = [f"onnx:{form}"]
    _, address = await programs.coordinator(tmp_path / "journal", run, "--model", prepared / "tiny")
    ours = programs.worker(address, "ours", prepared / "rows.jsonl", prepared / "tiny")
    theirs = await asyncio.to_thread(
        subprocess.run,
        command(node, prepared, address, "theirs"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert theirs.returncode == 0, theirs.stderr
    assert await ours.wait() == 0
    found = re.fullmatch(rf"round {ROUNDS}, digest ([0-9a-f]{{64}})\n", theirs.stdout)
    assert found, theirs.stdout
    assert f"finished at round {ROUNDS}, weights {found[1]}" in ours.said


def test_it_names_what_it_cannot_do(node: str, tmp_path: Path) -> None:
    """Bad options end it at once with one sentence."""
    tried = subprocess.run(
        command(node, tmp_path, "127.0.0.1:1", "Not A Name"), capture_output=True, text=True
    )
    assert tried.returncode == 1
    assert tried.stderr.startswith("--name Not A Name is no worker's name")
    assert "    at " not in tried.stderr
