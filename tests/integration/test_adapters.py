"""A run that begins from an adapter: coordinator, worker and export have it, or are told so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_coordinator.replica import replica
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_core.errors import ConfigError, FedMezoError, MismatchError
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_core.records import Genesis
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.export import export_adapter
from fedmezo_core.zo.model import loading
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.party import open_party
from fedmezo_worker.engine import Engine
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import (
    config_of,
    run_values,
    scripted_workers,
    served,
    toml_of,
)

LORA = {"rank": 2, "alpha": 4, "target_modules": ["c_attn", "h.0.mlp.c_proj"]}
CONFIG = config_of(rounds=2, workers_min=1, quorum=1, local_steps=1, lora=LORA)
CARD = ModelCard(CONFIG.model, CONFIG.run_id)


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another run has trained."""
    party = open_party(CONFIG, str(model_folder), threads=1)
    party.weights.apply(1, [Commit(np.array([5], np.uint64), np.array([0.03], np.float32), 1)])
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    export_adapter(party.loaded, folder, CARD)
    return folder


@pytest.fixture(scope="module")
def genesis(model_folder: Path, adapter: Path) -> Genesis:
    return open_party(CONFIG, str(model_folder), adapter=adapter, threads=1).genesis()


async def test_the_coordinator_begins_from_it(
    model_folder: Path, adapter: Path, genesis: Genesis
) -> None:
    settings = CoordinatorSettings(model=str(model_folder), adapter=adapter)
    assert await describe_base(settings, CONFIG) == genesis
    orders: dict[str, Any] = {
        "config": config_to_pb(CONFIG).SerializeToString().hex(),
        "model": str(model_folder),
        "adapter": None,
        "threads": 1,
        "heldout": None,
        "row_states_max": 0,
    }
    assert replica.describe(orders)["base_digest"] != genesis.base_digest.hex()
    orders["config"] = config_to_pb(config_of()).SerializeToString().hex()
    with pytest.raises(ConfigError, match="this run trains no adapter"):
        replica.describe(orders | {"adapter": str(adapter)})


def test_a_new_run_reads_its_base_once_to_fit_the_adapter_and_to_digest(
    model_folder: Path, data_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    read_base = loading._read_base

    def counted(shown: str, *given: Any, **named: Any) -> loading.Base:
        read.append(shown)
        return read_base(shown, *given, **named)

    monkeypatch.setattr(loading, "_read_base", counted)
    orders: dict[str, Any] = {
        "config": config_to_pb(CONFIG).SerializeToString().hex(),
        "model": str(model_folder),
        "adapter": str(tmp_path / "fitted"),
        "adapter_rows": str(data_files[0]),
        "threads": 1,
        "heldout": None,
        "row_states_max": 0,
    }
    described = replica.describe(orders)["base_digest"]
    assert read == [str(model_folder)]
    fitted = open_party(CONFIG, str(model_folder), adapter=tmp_path / "fitted", threads=1)
    assert fitted.base_digest.hex() == described

    unlabelled = tmp_path / "texts.jsonl"
    texts = [row.values["text"] for row in read_rows(data_files[0], CONFIG.task)]
    unlabelled.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    orders |= {"adapter": str(tmp_path / "same"), "adapter_rows": str(unlabelled)}
    assert replica.describe(orders)["base_digest"] == described, "the fit reads no labels"


def test_a_fit_without_a_model_says_so(data_files: list[Path], tmp_path: Path) -> None:
    settings = tmp_path / "coordinator.toml"
    settings.write_text(toml_of({"run": run_values(lora={**LORA, "freeze_a": True})}))
    flags = ["--config", str(settings), "--data", str(data_files[0])]
    result = CliRunner().invoke(client_cli.app, ["adapter", str(tmp_path / "out"), *flags])
    assert "model is missing" in str(result.exception)


async def test_a_worker_without_it_is_refused(
    model_folder: Path, data_files: list[Path], adapter: Path, genesis: Genesis
) -> None:
    settings = WorkerSettings(name="w1", data=data_files[0], model=str(model_folder), threads=1)
    engine = Engine()
    try:
        with pytest.raises(MismatchError, match=r"base weights .* begin from the same adapter"):
            await engine.load(settings, genesis)
        await engine.load(settings.model_copy(update={"adapter": adapter}), genesis)
        assert engine.loaded.party.genesis() == genesis
    finally:
        await engine.close()


async def test_export_writes_the_adapter_alone(
    model_folder: Path, adapter: Path, genesis: Genesis, tmp_path: Path
) -> None:
    journal, out = tmp_path / "journal.db", tmp_path / "out"
    async with (
        served(journal, genesis) as coordinator,
        scripted_workers(coordinator.address, genesis, "w1") as [scripted],
    ):
        await scripted.open()
        await scripted.work_to_the_end()
    flags = ["--model", str(model_folder), "--journal", str(journal), "--threads", "1"]
    flags += ["--adapter-only"]

    def export(*more: str) -> str:
        result = CliRunner().invoke(
            client_cli.app, ["export", str(out), *flags, *more], catch_exceptions=False
        )
        return result.output

    with pytest.raises(MismatchError, match="begin from the same adapter"):
        export()
    said = export("--adapter", str(adapter))
    assert "the adapter after round 2, weights digest" in said
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    assert before.keys() == after.keys()
    assert not any(before[name].equal(after[name]) for name in before)
    card = (out / "README.md").read_text()
    words = (f'`"{word}"` for {label}' for label, word in CONFIG.task.verbalizers.items())
    for row in (
        f'Prompt | `"{CONFIG.task.template}"` |',
        f"Words for the classes | {', '.join(words)} |",
        "Round | 2 of 2",
        f"Rows | 2 answers, each measured on {CONFIG.batch_size} rows",
        "Run | ",
    ):
        assert f"| {row}" in card
    head = re.search(r"Head of the journal \| `(\w{64})`", card)
    assert head is not None
    verified = CliRunner().invoke(client_cli.app, ["journal", "verify", str(journal)])
    assert head.group(1) in verified.output.replace("\n", "")
    assert str(tmp_path) not in card
    # What it writes is the base of the next run, bit by bit.
    party = open_party(CONFIG, str(model_folder), adapter=out, threads=1)
    assert party.weights.digest().hex() in said


async def test_a_run_without_an_adapter_has_none_to_write(genesis: Genesis, tmp_path: Path) -> None:
    plain = replace(genesis, config=config_of(rounds=1, workers_min=1, quorum=1, local_steps=1))
    journal = tmp_path / "journal.db"
    async with served(journal, plain):
        pass
    with pytest.raises(FedMezoError, match="--as adapter: this run trains no adapter"):
        CliRunner().invoke(
            client_cli.app,
            ["export", str(tmp_path / "out"), "--journal", str(journal), "--adapter-only"],
            catch_exceptions=False,
        )
