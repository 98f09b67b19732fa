"""Flags over environment over file, and one sentence for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import (
    Address,
    ListenAddress,
    UserPath,
    UserPathText,
    load_settings,
)


class Example(BaseSettings):
    """A program of the tests."""

    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")

    port_number: int = Field(default=1, ge=1, le=9, description="a port")
    label: str = Field(default="none", description="a label")
    chatty: bool = Field(default=True, description="a switch")
    run: dict[str, Any] = Field(default_factory=dict, description="a table")
    size: ByteSize = Field(default=ByteSize(256 << 20), description="a size of 5 %")
    data: Path | None = Field(default=None, description="a file")


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
    settings = load()
    assert (settings.port_number, settings.label) == (1, "none")
    assert (settings.chatty, settings.run) == (True, {})


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
    assert "use 9 or less" in said


def test_a_bad_value_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_PORT_NUMBER", "x")
    assert "port_number = 'x' is not allowed" in complaint()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("EXAMPLE_PORT_NUMBR", "write EXAMPLE_PORT_NUMBER, or unset it"),
        ("EXAMPLE_RUN_ROUNDS", "write EXAMPLE_RUN__ROUNDS, or unset it"),
        ("EXAMPLE_LABEL__X", "write EXAMPLE_LABEL, or unset it"),
        ("example_zzz", "unset it"),
    ],
)
def test_a_misspelt_variable_of_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setenv(name, "3")
    assert complaint() == f"The environment variable {name} is no setting; {remedy}."


@pytest.mark.parametrize(
    "name", ["EXAMPLE_PORT", "EXAMPLE_PORT_7465_TCP_ADDR", "EXAMPLE_SERVICE_HOST", "EXAMPLES_X"]
)
def test_variables_of_others_are_let_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kubernetes sets the first ones for a service with the program's name."""
    monkeypatch.setenv(name, "tcp://10.0.0.7:7465")
    assert load().label == "none"


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
    assert "run cannot be read" in complaint()


def test_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for shown in (
        "--port-number NUMBER a port (default: 1)",
        "--label TEXT a label (default: none)",
        "--chatty, --no-chatty a switch (default: yes)",
        "--run JSON a table --size",
        "--size SIZE a size of 5 % (default: 256MiB) --data",
        "--data PATH a file",
        "--config FILE TOML file with settings",
        "--version show the version",
    ):
        assert shown in said
    for word in ("dict[", "null", "Path", "factory", "268435456", "<bool>"):
        assert word not in said


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("example ")


class Required(BaseSettings):
    """A program that must be told what to do."""

    model_config = SettingsConfigDict(env_prefix="REQUIRED_")

    one: str = Field(description="a name")
    two: int
    three: int


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "one, two and three are missing; set them."),
        (["--one=a"], "two and three are missing; set them."),
        (["--one=a", "--two=2"], "three is missing; set it."),
        (["--one=a", "--two=b"], "three is missing; set it (1 more after this one)."),
        (["--one=a", "--two=b", "--three=1"], "two = 'b' is not allowed: use a whole number."),
    ],
)
def test_all_missing_keys_are_named_at_once(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Required, flags, program="required")
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thre = 1", "thre is not a known setting; write three, or remove it (3 more after"),
        ("one = 'a'\ntwo = 2\nthree = 3\nzzz = 1", "zzz is not a known setting; remove it or"),
    ],
)
def test_a_misspelt_key_is_named_before_the_missing_ones(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Required, ["--config", str(tmp_path / "settings.toml")], program="required")
    assert f"settings.toml: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prot-number", "3"], "There is no flag --prot-number, but --port-number; see"),
        (["--zzz=3"], "There is no flag --zzz; see example --help."),
        (["port"], "'port' is no flag, and example takes flags alone; see example --help."),
        (["--port-number"], "argument --port-number: expected one argument; see example --help."),
    ],
)
def test_a_wrong_flag_is_told_in_one_sentence(flags: list[str], said: str) -> None:
    assert said in complaint(*flags)


class Paths(BaseSettings):
    """A program with addresses and paths."""

    model_config = SettingsConfigDict(env_prefix="PATHS_")

    address: Address = "127.0.0.1:1"
    listen: ListenAddress = "127.0.0.1:1"
    file: UserPath | None = None
    source: UserPathText = ""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_the_home_folder_is_meant_in_every_source(
    source: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "paths.toml").write_text("")
    flags = ["--config", "~/paths.toml"]
    if source == "flag":
        flags += ["--file=~/a", "--source=~/b"]
    elif source == "environment":
        monkeypatch.setenv("PATHS_FILE", "~/a")
        monkeypatch.setenv("PATHS_SOURCE", "~/b")
    else:
        (home / "paths.toml").write_text('file = "~/a"\nsource = "~/b"\n')
    settings = load_settings(Paths, flags, program="paths")
    assert (settings.file, settings.source) == (home / "a", f"{home}/b")


@pytest.mark.parametrize("flag", ["--file", "--source", "--config"])
def test_a_user_whom_nobody_knows_is_named(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"~nobody-here/a.* has a home folder here"):
        load_settings(Paths, [f"{flag}=~nobody-here/a"], program="paths")


def test_a_url_and_a_name_are_no_path(home: Path) -> None:
    for source in ("postgresql://a/b", "org/model", "a~b"):
        settings = load_settings(Paths, [f"--source={source}"], program="paths")
        assert settings.source == source


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7465", "[::1]:7465", "[fe80::1%eth0]:1", "host:1", "a.example-b.org:65535"],
)
def test_an_address_is_taken_as_it_is_written(address: str) -> None:
    flags = [f"--address={address}", f"--listen={address}"]
    settings = load_settings(Paths, flags, program="paths")
    assert (settings.address, settings.listen) == (address, address)


@pytest.mark.parametrize(
    ("address", "spelling"),
    [
        ("http://host:7465", "without a scheme or a path: host:7465"),
        ("https://host:7465/path", "without a scheme or a path: host:7465"),
        ("dns:///host:7465", "without a scheme or a path"),
        ("::1:7465", "in brackets: [::1]:7465"),
        ("fe80::2:7465", "in brackets: [fe80::2]:7465"),
        ("::1", "in brackets: [::1]:7465"),
        ("host name:7465", "write it as host:port, where the host is a name or an IP address"),
        ("[host]:7465", "write it as host:port"),
        ("[::1:7465", "write it as host:port"),
        ("user@host:7465", "write it as host:port"),
        ("host/path:7465", "write it as host:port"),
        ("host:7465/path", "write it as host:port"),
        ("host: 7465", "write it as host:port"),
        ("host:7465 ", "write it as host:port"),
        ("host:\u0667", "write it as host:port"),
    ],
)
@pytest.mark.parametrize("key", ["address", "listen"])
def test_another_spelling_of_an_address_is_corrected(key: str, address: str, spelling: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Paths, [f"--{key}={address}"], program="paths")
    assert f"{key} = {address!r} is not allowed" in str(caught.value)
    assert spelling in str(caught.value)


def test_a_file_with_a_byte_order_mark_is_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load("--config", str(file)).label == "file"
