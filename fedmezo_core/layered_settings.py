"""Settings of a daemon, checked by pydantic: flags come before environment, then a TOML file."""

from __future__ import annotations

import inspect
import os
import re
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ByteSize, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fedmezo_core.config import sentence_of
from fedmezo_core.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseSettings)

ROW_STATES_MAX = ByteSize(256 << 20)
"""Default size of the file that keeps row states (decision 0024), in bytes."""


def _check_address(value: str, *, port_min: int = 1) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not port_min <= int(port) < 65536:
        raise ValueError("write it as host:port, for example 127.0.0.1:7465")
    return value


def _check_key(value: str) -> str:
    if not re.fullmatch("([0-9a-f]{64})?", value):
        raise ValueError("use the 64 hex digits that the coordinator logs when it starts")
    return value


Address = Annotated[str, AfterValidator(_check_address)]
"""host:port of a coordinator to connect to."""
ListenAddress = Annotated[str, AfterValidator(partial(_check_address, port_min=0))]
"""host:port to listen on; with port 0 the system chooses a free port."""
CheckpointKey = Annotated[str, AfterValidator(_check_key)]
"""The public key that a coordinator must sign with, as 64 hex digits; empty: any."""


def load_settings(kind: type[Settings], arguments: Sequence[str], *, program: str) -> Settings:
    """Read `kind` from the command line, the environment and the file that `--config` names.

    The name of an environment variable is the `env_prefix` of `kind` followed by the key in upper
    case. Two underscores separate nested keys: FEDMEZO_COORDINATOR_RUN__EPS. Raises `ConfigError`,
    which names the key, the value and what is allowed. `--help` and unknown flags end the process,
    as argparse does.
    """
    prefix = kind.model_config.get("env_prefix", "")
    arguments, config_path = _take_config_flag(arguments, f"{prefix}CONFIG")
    file_values = _read_toml(config_path) if config_path is not None else {}

    class _Loaded(kind):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(extra="forbid")

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                CliSettingsSource(
                    settings_cls,
                    cli_prog_name=program,
                    cli_parse_args=list(arguments),
                    cli_kebab_case=True,
                    cli_implicit_flags=True,
                    cli_hide_none_type=True,
                    cli_avoid_json=False,
                ),
                EnvSettingsSource(settings_cls, env_nested_delimiter="__"),
                InitSettingsSource(settings_cls, init_kwargs=file_values),
            )

    _Loaded.__doc__ = inspect.getdoc(kind)
    _Loaded.__name__ = kind.__name__
    try:
        loaded: Settings = _Loaded()
    except ValidationError as error:
        where = str(config_path) if config_path is not None else program
        raise ConfigError(sentence_of(error, where)) from None
    except SettingsError as error:
        raise ConfigError(
            f"{program}: {error}; write a table as JSON, for example --run '{{\"rounds\": 5}}', "
            f"and check the flags and {prefix}*."
        ) from None
    return loaded


def _take_config_flag(
    arguments: Sequence[str], environment_name: str
) -> tuple[list[str], Path | None]:
    """Take `--config FILE` out of the arguments: the file is read before the rest is parsed."""
    rest: list[str] = []
    path = os.environ.get(environment_name)
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--config":
            path = next(waiting, "")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    if path == "":
        raise ConfigError("--config needs a file name; write --config coordinator.toml.")
    return rest, Path(path) if path is not None else None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read ({error.strerror}); check --config."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
