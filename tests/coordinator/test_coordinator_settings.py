"""The coordinator's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    RelaySettings,
    factors_stay_random,
    model_label,
)
from fedmezo_coordinator.runs.preparing import warn_if_no_loss_is_seen
from fedmezo_coordinator.serving.hosting import (
    FILES_RESERVED,
    connections_that_fit,
    sessions_that_fit,
)
from fedmezo_coordinator.serving.service import CONNECTIONS_BESIDE
from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.trust.join_string import JoinString
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import config_of, run_values, toml_of


def load(*arguments: str) -> CoordinatorSettings:
    return load_settings(CoordinatorSettings, arguments, program="fedmezo-coordinator")


@pytest.mark.parametrize("listen", ["here", "here:", ":80", "here:x", "1.2.3.4:65536", ""])
def test_an_address_that_is_none_is_named(listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"--listen={listen}")
    assert f"listen = {listen!r} is not allowed: write it as host:port" in str(caught.value)


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:7465", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.7:1", False),
        ("example.org:1", False),
    ],
)
def test_what_only_this_machine_can_reach(listen: str, loopback: bool) -> None:
    assert load(f"--listen={listen}").is_loopback is loopback


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eps = 1e-3", "eps belongs below [run], not above the first [table]; move it there"),
        ("[run]\nheldout = 'x'", "heldout belongs above the first [table], not below [run]; move"),
        (
            "[run.task]\nlisten = 'x'",
            "listen belongs above the first [table], not below [run.task]",
        ),
        ("[run]\nrun_id = 'a'\n[run.task]\nrounds = 3", "rounds belongs below [run], not below"),
        ("[run]\ntemplate = 'x'", "template belongs below [run.task], not below [run]; move it"),
        ("run = 3", "run = 3 is not allowed: use a table of keys and values"),
    ],
)
def test_a_key_in_the_wrong_table_is_told_its_own(text: str, said: str, tmp_path: Path) -> None:
    (file := tmp_path / "coordinator.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load("--config", str(file))
    assert f"{file}: {said}" in str(caught.value)


@pytest.mark.parametrize("kind", [CoordinatorSettings, RelaySettings, WorkerSettings])
def test_the_home_folder_is_meant_in_every_path(
    kind: type[BaseSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [
        name
        for name, field in kind.model_fields.items()
        if "Path" in str(field.annotation) or name in ("journal", "model")
    ]
    # A worker that serves a socket, or measures with a form, has no use for most of the others, and
    # a member is told by its fleet what to trust. Each of many runs has settings of its own, an
    # adapter is given or fitted, models have paths in a table, and evaluations are no rows.
    special = (
        "serve", "base_form", "state", "tls_cert_ca", "runs", "adapter_rows", "models",
        "evaluations",
    )  # fmt: skip
    groups = [[name for name in paths if name not in special]]
    groups += [["data", "model", "serve"], ["base_form", "data"]] if "serve" in paths else []
    groups += [[name] for name in ("adapter_rows", "evaluations") if name in paths]
    of_fleet = ["state", "tls_cert", "tls_cert_ca", "tls_key", "runs"]
    groups += [[name for name in of_fleet if name in paths]]
    for group in groups:
        given: dict[str, Any] = {"name": "w1", "data": "rows"} | dict.fromkeys(group, "~/file")
        if "privacy_ledger" in group:
            given |= {"privacy_epsilon": 1.0, "privacy_clip": 1.0}
        if "evaluations" in group:
            given |= {"heldout": "own.csv"}
        values: dict[str, Any] = {name: given[name] for name in kind.model_fields if name in given}
        settings = kind(**values)
        assert {str(getattr(settings, name)) for name in group} == {f"{tmp_path}/file"}


@pytest.mark.parametrize("key", ["journal", "heldout", "adapter_rows"])
def test_an_empty_path_is_not_the_current_folder(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = '' is not allowed: it is empty: write a path"):
        load(f"--{key.replace('_', '-')}", "")


def test_a_rate_is_measured_or_named() -> None:
    run = '{"learning_rate": 1e-3}'
    with pytest.raises(ConfigError, match="probe_rows measures a learning_rate and"):
        load("--probe-rows=rows.jsonl", f"--run={run}")
    assert load("--probe-rows=rows.jsonl").probe_rows == Path("rows.jsonl")


def test_a_rate_that_nobody_named_is_measured_on_rows_that_are_at_hand() -> None:
    def rows_of(run: dict[str, Any], **given: str) -> list[str]:
        settings = CoordinatorSettings.model_validate({"model": "base", "run": run, **given})
        return [str(path) for path in settings.rate_rows]

    at_hand = {"heldout": "heldout.jsonl", "adapter_rows": "texts.jsonl"}
    assert rows_of({}, **at_hand) == ["texts.jsonl", "heldout.jsonl"]
    assert rows_of({}, **at_hand, probe_rows="rows.jsonl") == ["rows.jsonl"]
    assert rows_of({"learning_rate": 0.1}, **at_hand) == []
    assert rows_of({"preset": "instruction"}, heldout="heldout.jsonl") == ["heldout.jsonl"]
    assert rows_of({}) == []


def test_the_rate_of_plain_steps_can_be_measured() -> None:
    plain = {key: value for key, value in run_values().items() if key != "learning_rate"}
    settings = CoordinatorSettings(
        model="base", run=plain | {"normalized_step": False}, probe_rows=Path("rows.jsonl")
    )
    assert not settings.run_config("the test").normalized_step
    with pytest.raises(ConfigError, match="learning_rate is missing"):
        settings.model_copy(update={"probe_rows": None}).run_config("the test")


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert load().is_loopback


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key"])
def test_one_tls_file_alone_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match="tls_cert and tls_key go together; set both or neither"):
        load(flag, "file.pem")


def test_the_run_comes_from_file_environment_and_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml_of({"run": run_values(rounds=1, eps=0.5, quorum=1)}))
    monkeypatch.setenv("FEDMEZO_COORDINATOR_RUN__ROUNDS", "5")
    monkeypatch.setenv("FEDMEZO_COORDINATOR_RUN__TASK__TEMPLATE", "{text}?")
    config = load("--config", str(file), "--run", '{"eps": 0.25}').run_config("the run")
    assert (config.rounds, config.eps, config.quorum) == (5, 0.25, 1)
    assert config.task.template == "{text}?"
    assert config.task.tokens_max == 32


def test_a_bad_run_value_names_its_key() -> None:
    settings = load("--model", "m", "--run", '{"run_id": "r", "task": {"tokens_max": 1}}')
    with pytest.raises(ConfigError, match=r"the run: task\.tokens_max = 1 is not allowed"):
        settings.run_config("the run")


def test_of_a_model_folder_only_its_name_is_shown_to_others(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert model_label(f"{tmp_path}/my-model/") == "my-model"
    assert model_label("org/name") == "org/name"


@pytest.mark.parametrize("name", ["sessions_max", "joins_at_a_time"])
@pytest.mark.parametrize(
    ("value", "allowed"), [(0, False), (1, True), (19_999, True), (20_000, True), (20_001, False)]
)
def test_a_limit_of_sessions_has_limits(name: str, value: int, allowed: bool) -> None:
    flag = f"--{name.replace('_', '-')}={value}"
    if allowed:
        assert getattr(load(flag), name) == value
    else:
        with pytest.raises(ConfigError, match=f"{name} = .{value}. is not allowed"):
            load(flag)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("caller_calls_per_s", "-1", False),
        ("caller_calls_per_s", "0", True),
        ("caller_calls_per_s", "0.5", True),
        ("caller_calls_per_s", "nan", False),
        ("caller_calls_per_s", "inf", False),
        ("caller_connections_max", "0", False),
        ("caller_connections_max", "1", True),
        ("caller_connections_max", "20128", True),
        ("caller_connections_max", "20129", False),
    ],
)
def test_the_limits_of_a_caller_have_limits(name: str, value: str, allowed: bool) -> None:
    flag = f"--{name.replace('_', '-')}={value}"
    if allowed:
        assert getattr(load(flag), name) == float(value)
    else:
        with pytest.raises(ConfigError, match=f"{name} = .{value}. is not allowed"):
            load(flag)


@pytest.mark.parametrize(("more", "fit"), [(-1, 99), (0, 100), (1, 100)])
def test_no_more_sessions_are_taken_than_files_may_be_opened(
    more: int, fit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hard = 100 + FILES_RESERVED + more
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    assert sessions_that_fit(load("--sessions-max=100")) == fit
    assert raised == [(fit + FILES_RESERVED, hard)]
    assert ("lower sessions_max" in caplog.text) is (more < 0)
    caplog.clear()
    assert sessions_that_fit(load()) == hard - FILES_RESERVED
    assert not caplog.text  # nobody asked for a number


@pytest.mark.parametrize(
    ("listen", "hard", "connections", "files"),
    [
        ("127.0.0.1:1", 100_000, 100 + CONNECTIONS_BESIDE, 100 + FILES_RESERVED),
        ("127.0.0.1:1", 100 + FILES_RESERVED, 100 + CONNECTIONS_BESIDE, 100 + FILES_RESERVED),
        ("127.0.0.1:1", 99 + FILES_RESERVED, 99 + CONNECTIONS_BESIDE, 99 + FILES_RESERVED),
        # Each of two addresses may have as many, if there are files for them.
        ("both:1", 100_000, 100 + CONNECTIONS_BESIDE, 200 + CONNECTIONS_BESIDE + FILES_RESERVED),
        ("both:1", 101 + FILES_RESERVED, 114, 101 + FILES_RESERVED),
        (
            "127.0.0.1:1",
            FILES_RESERVED - CONNECTIONS_BESIDE,
            1,
            FILES_RESERVED - CONNECTIONS_BESIDE,
        ),
    ],
)
def test_no_more_connections_are_open_than_files_may_be(
    listen: str, hard: int, connections: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [64]
    monkeypatch.setattr("resource.getrlimit", lambda _: (limits[-1], hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new[0]))
    addresses = ["127.0.0.1", "::1"] if listen.startswith("both") else ["127.0.0.1"]
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (a, 0)) for a in addresses]
    )
    assert connections_that_fit(load("--sessions-max=100", f"--listen={listen}")) == connections
    assert limits[-1] == files


@pytest.mark.parametrize(
    ("settings", "run", "warns"),
    [
        ({}, {}, True),
        ({"model": "m"}, {}, True),
        ({"model": "m", "heldout": "rows.jsonl", "replica": False}, {}, True),
        ({"model": "m", "heldout": "rows.jsonl"}, {}, False),
        ({}, {"report_losses": True}, False),
        ({}, {"pause_rounds": 0}, False),
    ],
)
def test_a_run_whose_loss_nobody_sees_is_told_so(
    settings: dict[str, Any], run: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_no_loss_is_seen(CoordinatorSettings(**settings), config_of(**run))
    assert ("goes unnoticed" in caplog.text) is warns


@pytest.mark.parametrize(
    ("settings", "lora", "random"),
    [
        ({}, {"output_rank": 2}, True),
        ({}, {}, False),
        ({"adapter": "folder"}, {"output_rank": 2}, False),
        ({"adapter_rows": "rows.jsonl"}, {"output_rank": 2}, False),
    ],
)
def test_factors_that_are_fitted_to_nothing_are_known(
    settings: dict[str, Any], lora: dict[str, Any], random: bool
) -> None:
    adapter = {"rank": 2, "alpha": 2, "target_modules": ["q_proj"], "freeze_a": True, **lora}
    given = CoordinatorSettings(model="m", **settings)
    assert factors_stay_random(given, config_of(lora=adapter)) is random


@pytest.mark.parametrize(
    ("upstream", "listen"),
    [
        ("10.0.0.7:7466", "10.0.0.7:7466"),
        ("localhost:7466", "127.0.0.1:7466"),
        ("127.0.0.1:7466", "0.0.0.0:7466"),
        ("[::1]:7466", "[::]:7466"),
    ],
)
def test_a_relay_is_not_its_own_coordinator(upstream: str, listen: str) -> None:
    values = {"name": "site-a", "upstream": upstream, "listen": listen}
    with pytest.raises(ValidationError, match="is this relay's own address"):
        RelaySettings.model_validate(values)
    RelaySettings.model_validate(values | {"listen": "127.0.0.1:7467"})


def test_a_relay_is_of_the_coordinator_whose_fleet_it_joins() -> None:
    join = str(JoinString("coordinator.example:7465", 7466, b"f" * 32, b"i" * 8, b"s" * 16))
    values = {"name": "site-a", "join": join, "listen": "127.0.0.1:0"}
    assert RelaySettings.model_validate(values).upstream == "coordinator.example:7465"
    same = values | {"upstream": "coordinator.example:7465"}
    assert RelaySettings.model_validate(same).upstream == "coordinator.example:7465"
    with pytest.raises(
        ValidationError, match=r"upstream is other.example:1, .* leave upstream out"
    ):
        RelaySettings.model_validate(values | {"upstream": "other.example:1"})
    with pytest.raises(ValidationError, match="cut off or changed"):
        RelaySettings.model_validate(values | {"join": join[:-1]})
