"""What the apps make of their configurations, and what they refuse."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fedmezo
import fedmezo_flower
from fedmezo import Coordinator, begin_run
from fedmezo_core import program
from fedmezo_core.config import parse_run
from fedmezo_core.errors import ConfigError, FedMezoError, UnavailableError
from fedmezo_core.records import Resumed
from fedmezo_flower import flower_client, flower_server
from fedmezo_flower.flower_server import AppSettings
from tests.integration.support.flower_grid import FakeGrid, resident
from tests.integration.support.harness import (
    ROOT,
    environment,
    genesis_of,
    records_of,
    run_values,
    toml_of,
    values_without_rate,
)
from tests.integration.support.parties import write_rows
from tests.library.light_engine import LightEngine


def context(**node_config: str) -> Context:
    config: UserConfig = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(1, 1, config, RecordDict(), {})


# ---------------------------------------------------------------- versions


def test_the_tested_versions_are_those_that_the_extra_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    package, at_least, below, extra = fedmezo_flower.TESTED
    [requirement] = map(Requirement, project["optional-dependencies"][extra])
    assert requirement.name == package
    assert requirement.specifier == SpecifierSet(f">={at_least},<{below}")


def test_an_untested_flower_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "version", lambda _: "1.50.0")
    with pytest.raises(ConfigError, match=r"^flwr 1\.50\.0 was not tested .* < 1\.43\.$"):
        importlib.reload(fedmezo_flower)


# ---------------------------------------------------------------- a node


def test_the_process_of_a_message_loads_no_torch() -> None:
    code = (
        "import sys; from fedmezo_flower import flower_client; "
        "loaded = {'torch', 'transformers', 'numba'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize("kind", ["train.fedmezo", "train.fedmezo_beside"])
def test_a_node_that_names_nothing_is_told_what_to_set(kind: str) -> None:
    FakeGrid([])  # So that this process may make messages.
    values = ConfigRecord(
        {"genesis": b"", "down": b"", "coordinator": "", "run_id": "", "checkpoint_key": ""}
    )
    message = Message(RecordDict({"fedmezo": values}), 1, kind)
    key = "fedmezo-socket" if kind == "train.fedmezo" else "fedmezo-worker"
    with pytest.raises(ConfigError, match=f"--node-config '{key}="):
        flower_client.app(message, context())


@pytest.mark.parametrize("kind", ["train.fedmezo", "train.fedmezo_beside"])
def test_a_message_of_another_app_is_named(kind: str) -> None:
    FakeGrid([])
    message = Message(RecordDict(), dst_node_id=1, message_type=kind)
    with pytest.raises(ConfigError, match="The message has no record fedmezo"):
        flower_client.app(message, context())


def test_what_the_node_s_file_names_comes_before_what_the_server_says(tmp_path: Path) -> None:
    own = tmp_path / "worker.toml"
    own.write_text(toml_of({"name": "w1", "checkpoint_key": "0" * 64}))
    given = {"coordinator": "host:1", "run_id": "", "checkpoint_key": "f" * 64}
    command = flower_client.worker_command(own, given)
    assert command[1:] == ["-m", "fedmezo_worker", f"--config={own}", "--coordinator=host:1"]


@pytest.mark.parametrize("text", [None, "name = "])
def test_a_node_s_file_that_cannot_be_read_is_named_in_the_node_s_log_alone(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "worker.toml"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ConfigError, match="The file that fedmezo-worker of") as raised:
        flower_client.worker_command(own, {})
    assert str(own) not in str(raised.value)
    assert str(own) in caplog.text


def test_a_worker_that_fails_beside_flower_is_an_error_of_its_node(tmp_path: Path) -> None:
    FakeGrid([])
    own = tmp_path / "worker.toml"
    own.write_text(toml_of({"name": "w1", "data": str(tmp_path / "gone.jsonl")}))
    values = {"coordinator": "127.0.0.1:9", "run_id": "", "checkpoint_key": ""}
    record = RecordDict({"fedmezo": ConfigRecord(dict(values))})
    with pytest.raises(UnavailableError, match="ended with status 2") as raised:
        flower_client.app(
            Message(record, 1, "train.fedmezo_beside"), context(fedmezo_worker=str(own))
        )
    assert str(tmp_path) not in str(raised.value)


# ---------------------------------------------------------------- the server


def settings_of(journal: Path, resume: float = 0.0, **changes: Any) -> AppSettings:
    run = {key: value for key, value in run_values(**changes).items() if key != "model"}
    return AppSettings(model="tiny", journal=str(journal), resume=resume, run=run)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A run that was interrupted before its first round."""
    path = tmp_path / "journal.db"
    Coordinator(genesis_of(parse_run(run_values(), "the test's run")), path).close()
    return path


def test_a_run_goes_on_from_its_journal_without_a_model(journal: Path) -> None:
    coordinator = flower_server.open_coordinator(settings_of(journal))
    assert coordinator.epoch == 2
    coordinator.close()


def test_a_journal_of_another_contract_is_refused(journal: Path) -> None:
    with pytest.raises(ConfigError, match=r"belongs to a run with rounds = 6, .* say 7"):
        flower_server.open_coordinator(settings_of(journal, rounds=7))
    flower_server.open_coordinator(settings_of(journal)).close()


def test_a_run_without_a_rate_is_measured_on_the_server_s_rows(
    tmp_path: Path, model_folder: Path
) -> None:
    given = values_without_rate()
    rows = str(write_rows(tmp_path / "rows.jsonl", count=60))
    settings = AppSettings(model=str(model_folder), run=given, rate_rows=rows)
    coordinator = flower_server.open_coordinator(settings)
    taken = coordinator.config
    coordinator.close()
    assert taken == begin_run(given, model_folder, rate_rows=rows).config
    assert taken.learning_rate < parse_run(given, "the test's run").learning_rate


def test_an_app_without_a_contract_is_told_where_to_write_it() -> None:
    with pytest.raises(ConfigError, match=r"write it below \[tool.flwr.app.config.run\]"):
        flower_server.open_coordinator(AppSettings(model="tiny"))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("resume", -1, "use 0.0 or more"),
        ("resume", float("nan"), "use a number that is finite"),
        ("resume", True, "use a number"),
        ("resume", "0.5", "use a number"),
        ("journal", "run.db", "use the whole path of a file on the server"),
        ("journal", 7, "use text, in quotes"),
        ("rate_rows", "rows.jsonl", "use the whole path of a file on the server"),
        ("model", 7, "use text, in quotes"),
        ("adapter", True, "use text, in quotes"),
        ("coordinator", "http://127.0.0.1:1", "write it as host:port"),
        ("checkpoint_key", "abc", "use the 64 hex digits"),
        ("run", "tiny", "use a table of keys and values"),
        ("journel", "/run.db", "is not a known setting"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_before_anything_begins(
    key: str, value: Any, allowed: str
) -> None:
    settings = Context(1, 1, {}, RecordDict(), {"run.run_id": "a", key: value})
    with pytest.raises(ConfigError, match=rf"^\[tool\.flwr\.app\.config\]: {key} .*{allowed}"):
        flower_server.main(FakeGrid([]), settings)


def test_the_example_s_values_are_allowed() -> None:
    app = tomllib.loads((ROOT / "examples/flower/pyproject.toml").read_text())
    settings = AppSettings.of(app["tool"]["flwr"]["app"]["config"], "the example")
    assert settings.contract["run_id"] == "flower-example"


def test_lists_of_a_contract_are_words_in_a_string() -> None:
    given = {
        "train": "*.attn.* lm_head",
        "lora": {"target_modules": "q_proj v_proj", "rank": 8},
        "task": {"template": "a b", "verbalizers": {"train": " a b"}},
    }
    assert flower_server.with_lists(given) == {
        "train": ["*.attn.*", "lm_head"],
        "lora": {"target_modules": ["q_proj", "v_proj"], "rank": 8},
        "task": {"template": "a b", "verbalizers": {"train": " a b"}},
    }


class Unable(LightEngine):
    """A worker's engine that cannot measure."""

    def measure(self, order: fedmezo.Measure) -> fedmezo.Measured:
        raise fedmezo.MeasurementError("a loss is not a number")


def test_a_paused_run_ends_in_an_error_until_it_is_resumed(tmp_path: Path) -> None:
    grid = FakeGrid([tmp_path / "w1.sock"])
    settings = settings_of(
        tmp_path / "journal.db", workers_min=1, quorum=1, pause_rounds=3, deadline_ms=1000
    )
    genesis = genesis_of(parse_run({"model": "tiny"} | settings.run, "the test's run"))
    fedmezo.Coordinator(genesis, settings.journal).close()
    federate = partial(flower_server.federate, grid, clock_s=grid.clock, sleep_s=grid.sleep)

    def worker_of(engine: type[LightEngine]) -> AbstractContextManager[None]:
        return resident(
            "w1", grid.sockets[0], lambda body: fedmezo.Session(body, "w1", engine("w1"))
        )

    with worker_of(Unable), pytest.raises(FedMezoError, match=r"paused .*resume = 0\.5"):
        federate(settings)
    with pytest.raises(FedMezoError, match="paused"):
        federate(settings)
    with worker_of(LightEngine):
        federate(settings.model_copy(update={"resume": 0.5}))
    assert any(isinstance(record, Resumed) for record in records_of(tmp_path / "journal.db"))


class BesideGrid(FakeGrid):
    """Nodes whose workers take part elsewhere; the second one's fails."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            message_id = f"m{node_id}"
            message.metadata.__dict__["_message_id"] = message_id
            ok = Message(RecordDict({"fedmezo": ConfigRecord({"status": 0})}), reply_to=message)
            failed = Message(Error(2, "no worker"), reply_to=message)
            self._replies[message_id] = failed if node_id in self.failing else ok
            ids.append(message_id)
        return ids

    failing: frozenset[int] = frozenset()


@pytest.mark.parametrize("failing", [frozenset(), frozenset({2}), frozenset({1, 2})])
def test_a_run_beside_flower_ends_when_every_worker_has(
    failing: frozenset[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flower_server, "LOOK_EVERY_S", 0.0)
    grid = BesideGrid([Path("a"), Path("b")])
    grid.failing = failing
    settings = AppSettings(coordinator="127.0.0.1:9", run={"run_id": "tiny-run"})
    if len(failing) == len(grid.nodes):
        with pytest.raises(FedMezoError, match="No worker took part to the end: no worker"):
            flower_server.gather(grid, settings)
    else:
        flower_server.gather(grid, settings)
        assert "The worker of node 1 is done" in caplog.text
    for node_id in failing:
        assert f"Node {node_id}: no worker" in caplog.text
