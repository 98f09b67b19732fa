"""The reference pages, made from the code: commands, settings, messages, the library."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import typer.main
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import fedmezo
from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    InitSettings,
    RelaySettings,
)
from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_worker.worker_settings import WorkerSettings

PROTO = Path(__file__).parents[2] / "proto"
SETTINGS: Mapping[str, type[BaseModel]] = {
    "fedmezo-coordinator": CoordinatorSettings,
    "fedmezo-coordinator init": InitSettings,
    "fedmezo-worker": WorkerSettings,
    "fedmezo-relay": RelaySettings,
    "[run]": RunConfig,
    "[run.task]": TaskConfig,
    "[run.lora]": LoraConfig,
}


def reference_pages() -> Iterator[tuple[str, str]]:
    """Path and Markdown text of each page."""
    yield "reference/commands.md", "# Commands\n\n" + "".join(_commands(_root(), "fedmezo", 2))
    yield "reference/settings.md", _settings_page()
    for file in _proto_files():
        name = Path(file.name).stem
        yield f"reference/{name}-proto.md", "".join(_proto(file))
    yield "reference/library.md", "".join(_library())


def _library() -> Iterator[str]:
    """What `fedmezo` exports, as mkdocstrings reads it from the sources."""
    yield f"# Python library\n\n{fedmezo.__doc__}\n"
    yield "[The library](../library.md) shows how they go together.\n\n"
    for name in sorted(fedmezo.__all__):
        home = getattr(fedmezo, name).__module__
        yield f"::: {home}.{name}\n    options:\n"
        yield "      heading_level: 2\n      show_root_heading: true\n"
        yield "      show_root_full_path: false\n\n"


# ---------------------------------------------------------------- commands and settings


def _root() -> Any:
    return typer.main.get_command(app)


def _commands(command: Any, path: str, level: int) -> Iterator[str]:
    """A command and what belongs to it; typer's commands are click's, or have their interface."""
    children: Mapping[str, Any] = getattr(command, "commands", {})
    yield f"{'#' * min(level, 4)} `{path}`\n\n{_plain(command.help)}\n\n"
    rows = [_parameter(p) for p in command.params if getattr(p, "help", None) or not children]
    if any(rows) and not children:
        yield "| argument or option | default | meaning |\n|---|---|---|\n"
        yield "".join(row for row in rows if row) + "\n"
    for name, child in children.items():
        if not child.hidden:
            yield from _commands(child, f"{path} {name}", level + 1)


def _parameter(parameter: Any) -> str:
    if parameter.name == "help":
        return ""
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    default = parameter.default
    shown = "" if default is None or callable(default) or default == () else _value(default)
    if parameter.required:
        shown = "required"
    context = click.Context(click.Command("none"))
    try:
        kind = parameter.type.get_metavar(parameter, context) or ""
    except TypeError:
        kind = ""
    name = ", ".join(f"`{name}`" for name in names)
    meaning = _plain(getattr(parameter, "help", "") or "")
    return f"| {name} {_cell(kind)} | {_cell(shown)} | {_cell(meaning)} |\n"


def _settings_page() -> str:
    parts = [
        "# Settings\n\nEach also has a flag; [configuration](../configuration.md) explains.\n\n"
    ]
    for name, kind in SETTINGS.items():
        parts.append(f"## `{name}`\n\n{_plain(kind.__doc__)}\n\n")
        parts.append("| key | default | meaning |\n|---|---|---|\n")
        for key, field in kind.model_fields.items():
            default = "" if field.default is None else _value(field.default)
            if field.default is PydanticUndefined:
                default = "required" if field.is_required() else ""
            parts.append(f"| `{key}` | {_cell(default)} | {_cell(field.description or '')} |\n")
        parts.append("\n")
    return "".join(parts)


def _value(value: object) -> str:
    return f"`{value}`" if value not in ("", (), [], {}) else ""


def _plain(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------- messages


def _proto_files() -> list[FileDescriptorProto]:
    """The .proto files with their comments."""
    files = sorted(PROTO.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        arguments = ["protoc", f"-I{PROTO}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main([*arguments, *map(str, files)]) != 0:
            raise RuntimeError("protoc refused the .proto files; it has said why")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def _proto(file: FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(location.path): _plain_lines(location.leading_comments)
        for location in file.source_code_info.location
    }
    yield f"# {Path(file.name).name}\n\n"
    # The comment above `syntax` is the file's.
    yield comments.get((12,), "") + "\n\n"
    for number, service in enumerate(file.service):
        yield f"## {service.name}\n\n{comments.get((6, number), '')}\n\n"
        yield "| method | takes | returns | |\n|---|---|---|---|\n"
        for index, method in enumerate(service.method):
            takes = ("stream of " if method.client_streaming else "") + _type(method.input_type)
            gives = ("stream of " if method.server_streaming else "") + _type(method.output_type)
            about = _cell(comments.get((6, number, 2, index), ""))
            yield f"| `{method.name}` | {takes} | {gives} | {about} |\n"
        yield "\n"
    for number, message in enumerate(file.message_type):
        yield from _message(message, (4, number), comments)
    for number, enum in enumerate(file.enum_type):
        yield from _enum(enum, (5, number), comments)


def _message(
    message: DescriptorProto, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"## {message.name}\n\n{comments.get(path, '')}\n\n"
    if message.field:
        yield "| field | number | type | meaning |\n|---|---|---|---|\n"
        for index, field in enumerate(message.field):
            about = _cell(comments.get((*path, 2, index), ""))
            yield f"| `{field.name}` | {field.number} | {_field_type(field)} | {about} |\n"
        yield "\n"


def _enum(
    enum: EnumDescriptorProto, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"## {enum.name}\n\n{comments.get(path, '')}\n\n"
    yield "| value | number | meaning |\n|---|---|---|\n"
    for index, value in enumerate(enum.value):
        about = _cell(comments.get((*path, 2, index), ""))
        yield f"| `{value.name}` | {value.number} | {about} |\n"
    yield "\n"


def _field_type(field: FieldDescriptorProto) -> str:
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    shown = _type(field.type_name) if field.type_name else f"`{name}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {shown}"
    return f"optional {shown}" if field.proto3_optional else shown


def _type(name: str) -> str:
    return f"`{name.rpartition('.')[2]}`"


def _plain_lines(comment: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in comment.splitlines()).strip()
