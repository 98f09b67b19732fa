"""The job that the recipe builds."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedmezo_nvflare
from fedmezo import decode_genesis, encode_genesis
from fedmezo.presets import parse_contract
from fedmezo_core import program
from fedmezo_core.errors import ConfigError
from fedmezo_nvflare import FedMezoController, FedMezoRecipe, ScalarPrivacy
from fedmezo_nvflare.round_controller import GENESIS_FILE
from tests.integration.support.harness import config_of, environment, genesis_of, run_values

GENESIS = encode_genesis(genesis_of(config_of(workers_min=2, quorum=2)))


def exported(folder: Path, **more: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The job's folder, and the configurations of server and sites."""
    contract = run_values(workers_min=2, quorum=2)
    FedMezoRecipe(contract=contract, genesis=GENESIS, **more).export(str(folder))
    app = next(folder.rglob("config_fed_server.json")).parents[1]
    server, client = (
        json.loads((app / f"config/config_fed_{side}.json").read_text())
        for side in ("server", "client")
    )
    return app, server, client


def test_a_job_brings_the_genesis_and_no_code(tmp_path: Path) -> None:
    app, server, client = exported(tmp_path)
    (brought,) = (app / "custom").rglob("*")
    assert decode_genesis(brought.read_bytes()) == decode_genesis(GENESIS)
    assert brought.name == GENESIS_FILE
    (workflow,) = server["workflows"]
    assert workflow["path"] == "fedmezo_nvflare.round_controller.FedMezoController"
    assert client["task_result_filters"] == []
    assert json.loads(next(tmp_path.rglob("meta.json")).read_text())["min_clients"] == 2


def test_the_filter_and_the_journal(tmp_path: Path) -> None:
    privacy = ScalarPrivacy(clip=3.0, noise_multiplier=0.5)
    _, server, client = exported(tmp_path, privacy=privacy, journal="/kept/journal.db", resume=0.5)
    arguments = server["workflows"][0]["args"]
    assert (arguments["journal"], arguments["resume"]) == ("/kept/journal.db", 0.5)
    (chain,) = client["task_result_filters"]
    (filter_,) = chain["filters"]
    assert filter_["path"] == "fedmezo_nvflare.scalar_privacy.ScalarPrivacy"
    assert filter_["args"] == {"clip": 3.0, "noise_multiplier": 0.5}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("resume", -1, "use 0.0 or more"),
        ("resume", math.inf, "use a number that is finite"),
        ("resume", "0.5", "use a number"),
        ("min_clients", 0, "use 1 or more"),
        ("min_clients", 1.5, "use a whole number"),
        ("task_request_interval", 0.0, "use more than 0"),
        ("task_request_interval", math.nan, "use "),
        ("journal", "run.db", "use the whole path of a file on the server"),
        ("name", "../job", "it must match"),
        ("model", 7, "use text, in quotes"),
        ("adapter", 7, "use text, in quotes"),
        ("rate_rows", 7, "use text, in quotes"),
        ("genesis", "text", "valid bytes"),
        ("contract", "text", "table of keys"),
        ("privacy", 3.0, "instance of ScalarPrivacy"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(key: str, value: Any, allowed: str) -> None:
    given = {"contract": run_values(workers_min=2, quorum=2), "genesis": GENESIS} | {key: value}
    with pytest.raises(ConfigError, match=rf"^FedMezoRecipe: {key} .*{allowed}"):
        FedMezoRecipe(**given)


@pytest.mark.parametrize(("journal", "resume"), [("run.db", 0.0), ("", -1.0)])
def test_a_controller_checks_what_a_job_s_file_says(journal: str, resume: float) -> None:
    with pytest.raises(ConfigError, match=r"^FedMezoController: "):
        FedMezoController(journal, resume)


@pytest.mark.parametrize("key", ["rounds", "run_id"])
def test_a_contract_of_no_use(key: str) -> None:
    contract = run_values() | {key: "?"}
    with pytest.raises(ConfigError, match=key):
        FedMezoRecipe(contract=contract, genesis=GENESIS)


def test_the_genesis_of_another_contract() -> None:
    with pytest.raises(ConfigError, match="run with seed = 7, the contract says 8; make it again"):
        FedMezoRecipe(contract=run_values(seed=8), genesis=GENESIS)


def test_the_genesis_may_have_what_its_contract_leaves_open() -> None:
    """The names that a word means in the model, and a rate that was measured."""
    task = {"template": "{text}", "verbalizers": {"bad": " bad", "good": " good"}}
    contract = {"run_id": "r", "model": "m", "preset": "classification", "task": task}
    config = parse_contract(contract, "the test")
    assert config.lora is not None
    named = config.lora.model_copy(update={"target_modules": ("h.11.mlp.c_fc",)})
    begun = genesis_of(config.model_copy(update={"lora": named, "learning_rate": 0.1}))
    FedMezoRecipe(contract=contract, genesis=encode_genesis(begun))
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.1, the contract says 0\.2;"):
        FedMezoRecipe(contract=contract | {"learning_rate": 0.2}, genesis=encode_genesis(begun))
    with pytest.raises(ConfigError, match=r"rate_rows measure .* a genesis has its rate"):
        FedMezoRecipe(contract=contract, genesis=encode_genesis(begun), rate_rows="rows.jsonl")


def test_an_untested_version_of_nvflare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "version", lambda _: "2.10.0")
    with pytest.raises(ConfigError, match=r"nvflare 2\.10\.0 was not tested .* fedmezo\[nvflare\]"):
        importlib.reload(fedmezo_nvflare)


def test_the_server_needs_no_torch() -> None:
    source = (
        "import sys, fedmezo_nvflare.round_controller, fedmezo_nvflare.scalar_privacy; "
        "from fedmezo_core.journal import sqlite; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], env=environment()).returncode == 0
