"""torch, ONNX Runtime, llama.cpp and TypeScript in one run over gRPC end with one digest."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Genesis,
    Opened,
    Record,
    RoundSlot,
)
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.party import open_party
from tests.core.zo.conftest import make_tokenizer
from tests.core.zo.edge.conftest import base_folder, quantised
from tests.integration.support.harness import (
    PATIENCE_S,
    Programs,
    environment,
    records_of,
    toml_of,
)
from tests.integration.support.parties import write_rows
from tests.integrations.test_typescript import FEDMEZO, command, contract, node, programs

__all__ = ["base_folder", "node", "programs"]

ROUNDS = 4


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="module")
def prepared(node: str, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 4 bits as torch has it, rows, both forms, and the file of a run that lists them."""
    for package, extra in (
        ("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"),
        ("gguf", "llama-cpp"), ("llama_cpp", "llama-cpp"),
    ):  # fmt: skip
        pytest.importorskip(package, reason=f"needs fedmezo[{extra}], which is not installed")
    from benchmarks.integrations.gguf_models import write_llama

    folder = tmp_path_factory.mktemp("four")
    write_rows(folder / "rows.jsonl")
    model = quantised(base_folder, folder / "base", "Q4_0")
    write_llama(model, folder / "base.gguf", type_name="Q4_0")
    run = contract(
        workers_min=4,
        quorum=4,
        eps=1e-3,
        digest_every_rounds=2,
        lora={"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "freeze_a": True},
    )
    settings = {"model": str(folder / "base"), "run": run}
    (folder / "run.toml").write_text(toml_of(settings))
    run["base_forms"] = [
        _exported(folder, "form"),
        _exported(folder, "form-gguf", "--gguf", folder / "base.gguf"),
    ]
    (folder / "run.toml").write_text(toml_of(settings))
    (folder / "short.toml").write_text(toml_of({"run": run | {"rounds": ROUNDS}}))
    return folder


def _exported(folder: Path, form: str, *more: str | Path) -> str:
    done = subprocess.run(
        [*FEDMEZO, "export-form", folder / form, "--config", folder / "run.toml", *more],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
    )
    found = re.search(r'base_forms = \["(\S+)"\]', done.stdout)
    assert found, done.stdout
    return found[1]


async def test_they_end_a_run_with_one_digest(
    node: str, prepared: Path, programs: Programs, tmp_path: Path
) -> None:
    coordinator = programs.start(
        "fedmezo_coordinator",
        *("--config", prepared / "short.toml", "--journal", tmp_path / "journal"),
        *("--listen", "127.0.0.1:0", "--model", prepared / "base"),
    )
    address = (await coordinator.says(r"is served at (127\.0\.0\.1:\d+)"))[1]
    rows = prepared / "rows.jsonl"
    workers = [programs.worker(address, "torch", rows, prepared / "base")]
    workers += [
        programs.start(
            "fedmezo_worker",
            *("--coordinator", address, "--name", name, "--data", rows, "--threads", "1"),
            *("--base-form", prepared / form),
        )
        for name, form in (("onnx", "form"), ("llama", "form-gguf"))
    ]
    theirs = await asyncio.to_thread(
        subprocess.run,
        command(node, prepared, address, "typescript"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
    )
    assert theirs.returncode == 0, theirs.stderr
    found = re.fullmatch(rf"round {ROUNDS}, digest ([0-9a-f]{{64}})\n", theirs.stdout)
    assert found, theirs.stdout
    for worker in workers:
        assert await worker.wait() == 0, worker.said
        assert f"finished at round {ROUNDS}, weights {found[1]}" in worker.said
    coordinator.end()
    records = records_of(tmp_path / "journal")
    assert not any(isinstance(record, Diverged) for record in records)
    for name, correlation in _correlations(prepared, records).items():
        assert correlation >= 0.999, f"{name}: {correlation}"


@pytest.mark.parametrize("form", ["form", "form-gguf"], ids=["onnx", "llama"])
def test_a_worker_with_a_form_of_the_base_passes_the_battery(prepared: Path, form: str) -> None:
    worker = (
        *("-m", "fedmezo_worker", "--coordinator", "{address}", "--name", "w1"),
        *("--data", prepared / "rows.jsonl", "--threads", "1", "--base-form", prepared / form),
    )
    tested = subprocess.run(
        [
            *(*FEDMEZO, "conformance", "worker", "--config", prepared / "run.toml"),
            *("--data", prepared / "rows.jsonl", "--difference-max", "0.2"),
            *("--start", shlex.join([sys.executable, *map(str, worker)])),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 8,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "smallest correlation with our projected gradients" in tested.stdout


def _correlations(prepared: Path, records: Sequence[Record]) -> dict[str, float]:
    """Of each worker's gradients in the journal with torch's, on the same rows and weights."""
    genesis = records[0]
    assert isinstance(genesis, Genesis)
    config = genesis.config
    party = open_party(config, str(prepared / "base"), threads=1)
    data = prepared / "rows.jsonl"
    dataset = party.encode(data, read_rows(data, config.task))
    estimator = open_estimator(party, threads=1)
    names: dict[RoundSlot, str] = {}
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        if isinstance(record, Opened):
            for slot, name in enumerate(record.workers, record.first_slot):
                names[RoundSlot(record.round, slot)] = name
        elif isinstance(record, Answered):
            name = names[RoundSlot(record.round, record.slot)]
            seeds = seeds_of(config, record.round, record.slot, None)
            work = Work(seeds, config.learning_rate, config.eps, want_digest=False)
            order = Measure(Ticket(1, record.round, record.slot), work)
            batches = open_batches(party, dataset, name)
            ours = measure(party, estimator, batches, order, digest=party.weights.digest)
            pairs[name] += zip(record.projected_grads, ours.scalars.projected_grads, strict=True)
        elif isinstance(record, Committed):
            party.weights.apply(record.round, commits_of([record]))
    assert set(pairs) == {"torch", "onnx", "llama", "typescript"}
    return {name: float(np.corrcoef(np.transpose(both))[0, 1]) for name, both in pairs.items()}
