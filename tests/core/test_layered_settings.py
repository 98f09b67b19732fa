"""Flags over environment over file, and one sentence for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import load_settings


class Example(BaseSettings):
    """A program of the tests."""

    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")

    port_number: int = Field(default=1, ge=1, le=9, description="a port")
    label: str = Field(default="none", description="a label")
    chatty: bool = Field(default=True, description="a switch")
    run: dict[str, Any] = Field(default_factory=dict, description="a table")


def load(*arguments: str) -> Example:
    return load_settings(Example, arguments, program="example")


def complaint(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "example.toml"
    path.write_text(
        'port_number = 2\nlabel = "file"\n[run]\nrounds = 2\neps = 0.5\n[run.task]\nkind = "c"\n'
    )
    return path


def test_defaults() -> None:
    assert load().model_dump() == {"port_number": 1, "label": "none", "chatty": True, "run": {}}


def test_the_file_overrides_defaults(file: Path) -> None:
    settings = load("--config", str(file))
    assert (settings.port_number, settings.label) == (2, "file")
    assert settings.run == {"rounds": 2, "eps": 0.5, "task": {"kind": "c"}}
    assert load(f"--config={file}").model_dump() == settings.model_dump()


def test_the_environment_overrides_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_CONFIG", str(file))
    monkeypatch.setenv("EXAMPLE_PORT_NUMBER", "3")
    settings = load()
    assert (settings.port_number, settings.label) == (3, "file")


def test_flags_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_PORT_NUMBER", "3")
    monkeypatch.setenv("EXAMPLE_LABEL", "environment")
    settings = load("--port-number", "4", "--no-chatty")
    assert (settings.port_number, settings.label) == (4, "environment")
    assert settings.chatty is False


@pytest.mark.parametrize(
    "flags", [["--run", '{"rounds": 5}'], ["--run", "rounds=5"], ['--run={"rounds": "5"}']]
)
def test_a_table_can_be_given_by_a_flag(flags: list[str]) -> None:
    assert int(load(*flags).run["rounds"]) == 5


def test_a_tables_keys_can_be_given_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_RUN__ROUNDS", "5")
    monkeypatch.setenv("EXAMPLE_RUN__TASK__TEMPLATE", "{a}: b")
    assert load().run == {"rounds": "5", "task": {"template": "{a}: b"}}


def test_tables_of_all_sources_are_merged_key_by_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_RUN__ROUNDS", "5")
    settings = load("--config", str(file), "--run", '{"eps": 0.25}')
    assert settings.run == {"rounds": "5", "eps": 0.25, "task": {"kind": "c"}}


def test_a_bad_value_names_key_value_and_what_is_allowed() -> None:
    said = complaint("--port-number", "10")
    assert "port_number = '10' is not allowed" in said
    assert "less than or equal to 9" in said


def test_a_bad_value_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_PORT_NUMBER", "x")
    assert "port_number = 'x' is not allowed" in complaint()


def test_a_bad_value_in_the_file_names_the_file(file: Path) -> None:
    file.write_text("port_number = true\nchatty = 7\n")
    said = complaint("--config", str(file))
    assert f"{file}: " in said
    assert "chatty = 7 is not allowed" in said


def test_an_unknown_key_in_the_file(file: Path) -> None:
    file.write_text("prot_number = 2\n")
    assert f"{file}: prot_number is not a known setting" in complaint("--config", str(file))


def test_a_file_that_is_not_toml(file: Path) -> None:
    file.write_text("port_number = = 2\n")
    assert f"{file} is not valid TOML" in complaint("--config", str(file))
    file.write_bytes(b"label = '\xff'")
    assert f"{file} is not valid TOML" in complaint("--config", str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    said = complaint("--config", str(tmp_path / "gone.toml"))
    assert f"The configuration file {tmp_path}/gone.toml cannot be read" in said


@pytest.mark.parametrize("flags", [["--config"], ["--config="]])
def test_the_config_flag_needs_a_name(flags: list[str]) -> None:
    assert "--config needs a file name" in complaint(*flags)


@pytest.mark.parametrize("value", ['{"rounds": }', '{"rounds"'])
def test_a_table_that_is_not_json(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = complaint("--run", value)
    assert "run" in said
    assert """--run '{"rounds": 5}'""" in said
    monkeypatch.setenv("EXAMPLE_RUN", value)
    assert 'field "run"' in complaint()


def test_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    assert "--port-number" in capsys.readouterr().out


def test_an_unknown_flag_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--prot-number", "3")
    assert caught.value.code == 2
    assert "unrecognized arguments: --prot-number" in capsys.readouterr().err
