"""Finished runs on tiny models: journals of a full fine-tune and of a LoRA run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedmezo
from fedmezo import Coordinator, Session, TorchEngine
from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.records import Evaluated
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.party import open_party
from tests.core.zo.conftest import make_model, make_tokenizer
from tests.integration.conftest import data_files, heldout_file, one_torch_thread
from tests.integration.support.harness import run_values, toml_of
from tests.integration.support.parties import save_model

__all__ = ["data_files", "heldout_file", "one_torch_thread"]

ROUNDS = 4
LORA = {"rank": 4, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def invoked(*arguments: str | Path) -> str:
    """What `fedmezo` says; raises the error that ends it."""
    found = CliRunner().invoke(client_cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


@dataclass(frozen=True)
class FinishedRun:
    """A run of `ROUNDS` rounds, evaluated after each, and what it was made from."""

    journal: Path
    model: Path
    heldout: Path
    config: Path
    evaluations: list[Evaluated]


def finish(
    folder: Path, model: Path, data: list[Path], heldout: Path, **changes: Any
) -> FinishedRun:
    """Train to the end with two workers; evaluate as a coordinator's replica does."""
    values = run_values(rounds=ROUNDS, workers_min=2, quorum=2, **changes)
    config = folder / "coordinator.toml"
    config.write_text(f'model = "{model}"\n' + toml_of({"run": values}))
    genesis = fedmezo.begin_run(values, str(model))
    coordinator = Coordinator(genesis, folder / "journal.db")
    sessions = {
        name: Session(genesis, name, TorchEngine(genesis, name, str(model), path, threads=1))
        for name, path in zip(("clinic-a", "clinic-b"), data, strict=False)
    }
    party = open_party(genesis.config, str(model), threads=1)
    held_out = party.encode(heldout, read_rows(heldout, genesis.config.task))
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    while not coordinator.done:
        for name, session in sessions.items():
            for down in coordinator.outgoing(name):
                for up in session.receive(down):
                    coordinator.receive(name, up)
    coordinator.close()
    return FinishedRun(
        folder / "journal.db", model, heldout, config, _evaluated(folder, party, held_out)
    )


def _evaluated(folder: Path, party: Any, held_out: Any) -> list[Evaluated]:
    """Replay the journal as the replica does, and record an evaluation of each round."""
    from fedmezo_core.journal.journal import Journal
    from fedmezo_core.journal.party_copy import verified
    from fedmezo_core.journal.sqlite import SqliteStore
    from fedmezo_core.records import Committed
    from fedmezo_core.zo.commits import commits_of

    journal = Journal(SqliteStore(folder / "journal.db"))
    commits = [record for _, record in verified(journal) if isinstance(record, Committed)]
    journal.close()
    found = []
    for commit in [None, *commits]:
        if commit is not None:
            party.weights.apply(commit.round, commits_of([commit]))
        result = evaluate(party.task, party.loaded.model, held_out, 32)
        found.append(
            Evaluated(
                party.weights.round,
                result.loss,
                result.accuracy,
                result.row_count,
                party.weights.digest(),
                result.auc,
            )
        )
    coordinator = Coordinator(store=folder / "journal.db")
    for one in found:
        coordinator.record_evaluation(one)
    coordinator.close()
    return found


@pytest.fixture(scope="session")
def full_run(
    tmp_path_factory: pytest.TempPathFactory, data_files: list[Path], heldout_file: Path
) -> FinishedRun:
    """A run that trains all weights of a GPT-2."""
    folder = tmp_path_factory.mktemp("full")
    save_model(folder / "base")
    return finish(folder, folder / "base", data_files, heldout_file, weighting="rows")


@pytest.fixture(scope="session")
def lora_run(
    tmp_path_factory: pytest.TempPathFactory, data_files: list[Path], heldout_file: Path
) -> FinishedRun:
    """A run that trains a LoRA adapter of a llama."""
    folder = tmp_path_factory.mktemp("lora")
    model: Any = make_model("llama-tied")
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return finish(
        folder, folder / "base", data_files, heldout_file, lora=LORA, learning_rate=3e-2, eps=1e-2
    )


@pytest.fixture(scope="session")
def lora_run_of_gpt2(
    full_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """The journal of a LoRA run of a GPT-2 before its first round."""
    folder = tmp_path_factory.mktemp("gpt2")
    values = run_values(lora={**LORA, "target_modules": ["c_attn"]})
    genesis = fedmezo.begin_run(values, str(full_run.model))
    Coordinator(genesis, folder / "journal.db").close()
    return replace(full_run, journal=folder / "journal.db")


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Export a run into a folder of its own."""

    def export(run: FinishedRun, *more: str | Path, name: str = "exported") -> Path:
        invoked(
            "export", tmp_path / name, "--journal", run.journal, "--model", run.model,
            *("--threads", "1", *more),
        )  # fmt: skip
        return tmp_path / name

    return export
