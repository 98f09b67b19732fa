"""Settings of a daemon, checked by pydantic: flags come before environment, then a TOML file."""

from __future__ import annotations

import inspect
import ipaddress
import os
import re
import tomllib
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefinedType
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
from fedmezo_core.service.log_lines import LogFormat, LogLevel

Settings = TypeVar("Settings", bound=BaseSettings)
ProgramSettingsT = TypeVar("ProgramSettingsT", bound="ProgramSettings")

ROW_STATES_MAX = ByteSize(256 << 20)
"""Default size of the file that keeps row states (decision 0024), in bytes."""


class OutputFormat(StrEnum):
    """How a command prints what it found or did."""

    TEXT = "text"
    JSON = "json"


def check_address(value: str, *, port_min: int = 1) -> str:
    """Return `value` if it is a host:port; otherwise the `ValueError` says how to write it."""
    if "://" in value:
        bare = value.partition("://")[2].partition("/")[0]
        raise ValueError(f"write it as host:port, without a scheme or a path: {bare}")
    host, _, port = value.rpartition(":")
    if ":" in host and not host.startswith("["):
        shown = f"[{host}]:{port}" if _is_ipv6(host) else "[::1]:7465"
        raise ValueError(f"write it as host:port, with an IPv6 address in brackets: {shown}")
    if not re.fullmatch("[0-9]{1,5}", port) or not port_min <= int(port) < 65536:
        raise ValueError("write it as host:port, for example 127.0.0.1:7465")
    if not (_is_ipv6(host[1:-1]) if host[-1:] == "]" else re.fullmatch(r"[\w.-]+", host)):
        raise ValueError("write it as host:port, where the host is a name or an IP address")
    return value


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def expanded(path: str) -> str:
    """`path` with the home folder in place of a `~` at its start; a URL is left as it is.

    Raises `ValueError` for a user whose home folder is not known.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError("nobody of that name has a home folder here; write the path") from None


def _check_key(value: str) -> str:
    if not re.fullmatch("([0-9a-f]{64})?", value):
        raise ValueError("use the 64 hex digits that the coordinator logs when it starts")
    return value


def _check_not_empty(path: object) -> object:
    # `Path` takes an empty text for the current folder.
    if path == "":
        raise ValueError("it is empty: write a path, or leave it out")
    return path


UserPath = Annotated[
    Path,
    BeforeValidator(_check_not_empty),
    AfterValidator(lambda path: Path(expanded(str(path)))),
]
"""A file or folder; `~` at its start is the user's home folder."""
UserPathText = Annotated[str, AfterValidator(expanded)]
"""A file or folder, or another name such as a URL; `~` at its start is the user's home folder."""
StoreName = Annotated[str, BeforeValidator(_check_not_empty), AfterValidator(expanded)]
"""A file or a URL, never empty; `~` at its start is the user's home folder."""
Address = Annotated[str, AfterValidator(check_address)]
"""host:port of a coordinator to connect to."""
ListenAddress = Annotated[str, AfterValidator(partial(check_address, port_min=0))]
"""host:port to listen on; with port 0 the system chooses a free port."""
OptionalAddress = Annotated[str, AfterValidator(lambda value: value and check_address(value))]
"""An `Address`, or empty."""
OptionalListenAddress = Annotated[
    str, AfterValidator(lambda value: value and check_address(value, port_min=0))
]
"""A `ListenAddress`, or empty."""
CheckpointKey = Annotated[str, AfterValidator(_check_key)]
"""The public key that a coordinator must sign with, as 64 hex digits; empty: any."""


class ProgramSettings(BaseSettings):
    """Settings of every daemon."""

    log_format: LogFormat = Field(
        default="text", description="text, or json: one JSON object a line, for programs"
    )
    log_level: LogLevel = Field(
        default="info", description="least level of what is logged: debug, info, warning or error"
    )


def changed_settings(before: Settings, now: Settings) -> list[str]:
    """Names of the settings whose values differ."""
    return [key for key in type(before).model_fields if getattr(before, key) != getattr(now, key)]


def load_settings(kind: type[Settings], arguments: Sequence[str], *, program: str) -> Settings:
    """Read `kind` from the command line, the environment and the file that `--config` names.

    The name of an environment variable is the `env_prefix` of `kind` followed by the key in upper
    case. Two underscores separate nested keys: FEDMEZO_COORDINATOR_RUN__EPS. Raises `ConfigError`,
    which names the key, the value and what is allowed. `--help` ends the process, as argparse does.
    """
    prefix = kind.model_config.get("env_prefix", "")
    arguments, config_path = _take_config_flag(arguments, f"{prefix}CONFIG")
    if prefix:
        _check_environment(kind, prefix)
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
                    cli_exit_on_error=False,
                    add_argument_method=partial(_add_flag, kind),
                ),
                EnvSettingsSource(settings_cls, env_nested_delimiter="__"),
                InitSettingsSource(settings_cls, init_kwargs=file_values),
            )

    _Loaded.__doc__ = inspect.getdoc(kind)
    _Loaded.__name__ = kind.__name__
    try:
        loaded: Settings = _Loaded()
    except ValidationError as error:
        where = str(config_path) if config_path is not None else ""
        raise ConfigError(sentence_of(error, where, kind=kind)) from None
    except SettingsError as error:
        if str(error).startswith(_OF_FLAGS):
            raise ConfigError(_flags_sentence(str(error), kind, program)) from None
        keys = "|".join(map(re.escape, kind.model_fields))
        named = re.search(rf"\b({keys})\b", str(error))
        raise ConfigError(
            f"{named.group() if named else 'A setting'} cannot be read: write a table as JSON, "
            f"for example --run '{{\"rounds\": 5}}', and check the flags and {prefix}*."
        ) from None
    return loaded


_OF_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT.*)|PORT(_[0-9]+_.*)?")
"""Ends of the variables that Kubernetes sets in each pod for a service, such as one of our name."""


def _check_environment(kind: type[BaseSettings], prefix: str) -> None:
    """Refuse environment variables of this program that are none of its settings.

    Nobody else would say so of a misspelt one: the environment has the variables of everybody.
    """
    for name in os.environ:
        rest = name.upper().removeprefix(prefix)
        if rest == name.upper() or rest == "CONFIG" or _OF_KUBERNETES.fullmatch(rest):
            continue
        path = rest.lower().split("__")
        field = kind.model_fields.get(path[0])
        if field is not None and (len(path) == 1 or _takes_keys(field.annotation)):
            continue
        tables = [key for key, one in kind.model_fields.items() if _takes_keys(one.annotation)]
        table = next((key for key in tables if path[0].startswith(f"{key}_")), None)
        if table is not None:
            near = [f"{table}__{path[0].removeprefix(f'{table}_')}"]
        else:
            near = get_close_matches(path[0], kind.model_fields, 1)
        remedy = f"write {prefix}{near[0].upper()}, or unset it" if near else "unset it"
        raise ConfigError(f"The environment variable {name} is no setting; {remedy}.")


def _takes_keys(annotation: object) -> bool:
    """Whether values of this type are tables, or may be."""
    if isinstance(annotation, type) and issubclass(annotation, (BaseModel, dict)):
        return True
    return get_origin(annotation) is dict or any(map(_takes_keys, get_args(annotation)))


_OF_FLAGS = "error parsing CLI: "
"""How pydantic-settings begins what its parser of flags says."""


def _flags_sentence(error: str, kind: type[BaseSettings], program: str) -> str:
    """What is wrong with the flags, for a person."""
    said = error.removeprefix(_OF_FLAGS)
    unknown = re.match(r"unrecognized arguments: (\S+)", said)
    if unknown is None:
        return f"{said}; see {program} --help."
    given = unknown[1].partition("=")[0]
    if not given.startswith("-"):
        return f"{given!r} is no flag, and {program} takes flags alone; see {program} --help."
    flags = [f"--{key.replace('_', '-')}" for key in kind.model_fields]
    near = get_close_matches(given, flags, 1)
    return f"There is no flag {given}{f', but {near[0]}' if near else ''}; see {program} --help."


def settings_of(kind: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """`kind` from `values` alone: neither flags nor the environment count.

    Raises `ConfigError`, which names `where` the values are from, the key and what is allowed.
    """

    class _Given(kind):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(extra="forbid")

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (InitSettingsSource(settings_cls, init_kwargs=values),)

    try:
        given: Settings = _Given()
    except ValidationError as error:
        raise ConfigError(sentence_of(error, where, kind=kind)) from None
    return given


def toml_values(text: str, where: str) -> dict[str, Any]:
    """The values in the text of a TOML file; raises `ConfigError`, which names `where` it is."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Of numbers and arrays without end, too.
        raise ConfigError(f"{where} is not valid TOML: {error}.") from None


def _add_flag(
    kind: type[BaseSettings], parser: ArgumentParser, *names: str, **options: Any
) -> None:
    """Add a flag to the parser, described in a person's words instead of Python's."""
    field = _field_at(kind, options.get("dest", ""))
    if field is not None:
        default = "required" if field.is_required() else _shown(field.default)
        words = f"{field.description or ''} ({default})" if default else field.description or ""
        options["help"] = words.replace("%", "%%")
        if "metavar" in options:
            options["metavar"] = _METAVARS.get(options["metavar"], options["metavar"])
    parser.add_argument(*names, **options)
    if "--help" in names:
        parser.add_argument(
            "--version",
            action="version",
            version=f"{parser.prog} {installed_version()}",
            help="show the version and exit",
        )
        parser.add_argument(
            "--config",
            metavar="FILE",
            default=SUPPRESS,
            help="TOML file with settings; flags and the environment come before it "
            f"(also {kind.model_config.get('env_prefix', '')}CONFIG)",
        )


def _field_at(kind: type[BaseModel], path: str) -> FieldInfo | None:
    """The field at a path such as `policy.rounds_max`; None if there is none."""
    key, _, rest = path.partition(".")
    field = kind.model_fields.get(key)
    if field is None or not rest:
        return field
    table = field.annotation
    if isinstance(table, type) and issubclass(table, BaseModel):
        return _field_at(table, rest)
    return None


def installed_version() -> str:
    """The version of FedMeZO that is installed."""
    try:
        return metadata.version("fedmezo")
    except metadata.PackageNotFoundError:
        return "(not installed)"


_METAVARS = {
    "str": "TEXT",
    "Path": "PATH",
    "int": "NUMBER",
    "float": "NUMBER",
    "ByteSize": "SIZE",
    "dict[str,Any]": "JSON",
    "dict[str,str]": "JSON",
    "dict[str,Path]": "JSON",
    "{Path,dict[str,JSON]}": "PATH",
    "tuple[str,...]": "LIST",
    "list[str]": "TEXT",
}
"""pydantic's names of types -> those that the help shows."""


def _shown(default: object) -> str:
    """The default of a setting as the help shows it; empty if there is none."""
    match default:
        case bool():
            return f"default: {'yes' if default else 'no'}"
        case ByteSize() if default and default % (1 << 20) == 0:
            return f"default: {default >> 20}MiB"
        case ByteSize() if default:
            return f"default: {default.human_readable(decimal=True)}"
        case float():
            return f"default: {default:g}"
        case None | "" | () | BaseModel() | PydanticUndefinedType():
            return ""
        case tuple():
            return f"default: {','.join(map(str, default))}"
    return f"default: {default}"


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
    try:
        return rest, None if path is None else Path(expanded(path))
    except ValueError as error:
        raise ConfigError(f"--config {path} is not allowed: {error}.") from None


def toml_text(path: Path) -> str:
    """The text of a TOML file; raises `ConfigError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read ({error.strerror}); check its path."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _read_toml(path: Path) -> dict[str, Any]:
    return toml_values(toml_text(path), str(path))
