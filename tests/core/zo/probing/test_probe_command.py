"""`fedmezo probe` on a tiny model: what it says, what it takes, and what it refuses."""

from __future__ import annotations

import json
import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.layered_settings import load_settings
from tests.integration.support.parties import save_model, write_rows

RUN = """
run_id = "probed"
rounds = 100
local_steps = 2
probes = 4
batch_size = 8
normalized_step = true
"""
TASK = """
[run.task]
template = "{text} It was"
tokens_max = 64
[run.task.verbalizers]
negative = " bad"
positive = " good"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "model"
    save_model(path)
    return path


def probe(
    tmp_path: Path, folder: Path, run: str, *flags: str, rows: int = 60, task: str = TASK
) -> Result:
    settings = tmp_path / "coordinator.toml"
    settings.write_text(f'model = "{folder}"\n[run]{run}{task}')
    data = write_rows(tmp_path / "rows.jsonl", count=rows)
    arguments = ["probe", "--config", str(settings), "--data", str(data), "--threads", "1", *flags]
    return CliRunner().invoke(client_cli.app, arguments)


def test_it_proposes_lines_for_the_contract_within_its_budget(folder: Path, tmp_path: Path) -> None:
    done = probe(tmp_path, folder, RUN, "--workers", "3")
    assert done.exit_code == 0, done.output
    assert "batch 1, 0.001 away: mean loss" in done.stderr
    assert "of the 4800 that 3 workers do in 100 rounds" in done.stdout
    block = done.stdout.split("\n\n")[1]
    values = tomllib.loads(block)
    assert values["normalized_step"] is True
    assert "# for 3 workers; plain steps would need learning_rate" in block
    following = f"\n{block}\nrun_id = 'next'\nlocal_steps = 2\nrate_directions = 0\n"
    with_rate = probe(tmp_path, folder, following, "--json")
    assert with_rate.exit_code == 0, with_rate.output
    found = json.loads(with_rate.stdout)
    assert found["workers"] == 1
    assert 44 <= found["passes"] <= 0.05 * found["run_passes"]
    assert found["run"].keys() <= RunConfig.model_fields.keys()
    assert found["plain_rate"] == pytest.approx(1.4 * found["normalized_rate"] / found["grad"])


def test_what_cannot_be_probed_is_refused_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    short = RUN.replace("rounds = 100", "rounds = 3")
    few = probe(tmp_path, folder, short)
    assert isinstance(few.exception, ConfigError)
    assert "at least 44 forward passes" in str(few.exception)
    assert "give --passes 44" in str(few.exception)
    few = probe(tmp_path, folder, RUN, "--passes", "3")
    assert "and --passes gives it 3; give --passes 44" in str(few.exception)
    plain = short.replace("normalized_step = true", "normalized_step = false")
    assert "normalized_step = false" in probe(tmp_path, folder, plain, "--passes", "44").stdout
    long = RUN.replace("rounds = 100", "rounds = 1000000")
    assert "\nrounds = 1000000\n" in probe(tmp_path, folder, long, "--passes", "44").stdout
    rows = probe(tmp_path, folder, RUN, rows=9)
    assert isinstance(rows.exception, DataError)
    assert re.match(
        r"9 rows, from row 1 of \S+ on, are fewer than two batches of 8", str(rows.exception)
    )
    task = TASK.replace("[run.task]", '[run.task]\nobjective = "somebody:scores"')
    scored = probe(tmp_path, folder, RUN, task=task)
    assert "scores batches by somebody:scores; choose its learning_rate by trial" in str(
        scored.exception
    )


@pytest.mark.parametrize("normalized", ["true", "false"])
async def test_a_coordinator_measures_the_rate_of_a_new_run(
    normalized: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RUN.replace("normalized_step = true", f"normalized_step = {normalized}")
    done = probe(tmp_path, folder, run, "--json")
    found = json.loads(done.stdout)["run"]
    file = tmp_path / "coordinator.toml"
    given = load_settings(CoordinatorSettings, ["--config", str(file)], program="the test")
    settings = given.model_copy(update={"probe_rows": tmp_path})
    genesis = await describe_base(settings, settings.run_config("the test"))
    assert "passed over 'coordinator.toml'" in caplog.text
    begun = genesis.config
    assert begun.normalized_step == found["normalized_step"]
    assert (begun.eps, begun.learning_rate) == (found["eps"], found["learning_rate"])
    # A restart means the same run, although its settings name no rate.
    again = parse_run({**begun.model_dump(), **settings.run}, "the test", begun)
    assert again == begun
    fixed = settings.model_copy(update={"run": settings.run | {"eps": 2e-3}})
    genesis = await describe_base(fixed, fixed.run_config("the test"))
    assert genesis.config.eps == 2e-3, "what [run] names is not measured"


async def test_a_run_without_a_rate_is_measured_on_the_rows_at_hand(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    short = RUN.replace("rounds = 100", "rounds = 3").replace("local_steps = 2", "local_steps = 1")
    run = {**tomllib.loads(short), "task": tomllib.loads(TASK)["run"]["task"]}
    labelled = write_rows(tmp_path / "rows.jsonl", count=60)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "A film, number {n}."}}\n' for n in range(60)))
    adapted = run | {"lora": {"rank": 2, "alpha": 2, "freeze_a": True, "target_modules": ["c_fc"]}}

    async def rates_of(**settings: Any) -> tuple[float, float]:
        """The rate of the contract alone, and that of the run."""
        given = CoordinatorSettings.model_validate({"model": str(folder), **settings})
        config = given.run_config("the test")
        return config.learning_rate, (await describe_base(given, config)).config.learning_rate

    own, taken = await rates_of(run=run, heldout=labelled)
    assert taken <= own
    assert f"measured on {labelled}: " in caplog.text
    assert "was not measured" not in caplog.text

    journal = str(tmp_path / "journal.db")
    own, taken = await rates_of(run=adapted, adapter_rows=texts, journal=journal)
    assert taken == own
    said = f"is {own:g}, which was not measured ({texts} has no column label"
    assert said in caplog.text
