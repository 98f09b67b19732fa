"""The folder of one run: its settings as they came, when and for whom, and the files it uses.

    settings.toml   as the operator wrote it
    run.json        when it was created, by whom, and what its files are
    adapter_rows.*, heldout.*, probe_rows.*, adapter/
    journal.db      and beside it the key, the mark, the snapshots and a fitted adapter

A folder appears whole or not at all. A run whose journal is empty has not begun yet.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmezo_coordinator.coordinator_settings import OF_A_RUN, CoordinatorSettings
from fedmezo_coordinator.runs.uploads import Uploads
from fedmezo_core.errors import ConfigError
from fedmezo_core.folders import sync, write_private
from fedmezo_core.layered_settings import settings_of, toml_values
from fedmezo_proto.v1 import runs_pb2 as wire

SETTINGS = "settings.toml"
ABOUT = "run.json"
NEW, DELETED = ".new-", ".deleted-"
"""Beginnings of the names of folders that are not a run yet, or any more."""
SETTINGS_CHARS_MAX = 48_000
"""Longest settings; with the files they fit into a message."""
ONE_FILE = ("adapter_rows", "heldout", "probe_rows")
"""Settings that name one file; `adapter` names a folder."""
_FILE_NAME = re.compile(
    r"(adapter_rows|heldout|probe_rows)(\.[A-Za-z0-9_-]+)*|adapter/[A-Za-z0-9_-][\w.-]*"
)

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading a file can raise whose JSON is not what this module wrote."""


class RunFolder:
    """A run's folder, which is there."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` if the folder holds no run that can be read."""
        self.path = path
        try:
            self.text = (path / SETTINGS).read_text(encoding="utf-8")
            about: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            self.created_ms = int(about["created_ms"])
            self.files: dict[str, str] = dict(about["files"])
        except _UNREADABLE as error:
            raise ConfigError(
                f"{path} holds no run that can be read ({error}); put {SETTINGS} and {ABOUT} "
                "back from a copy, or move the folder away."
            ) from None

    def settings(self, process: CoordinatorSettings) -> CoordinatorSettings:
        """The run's settings; `process` has those of the process that hosts it."""
        return run_settings(self.text, self.files, process, self.path)

    def is_of(self, text: str, files: Sequence[wire.RunFile]) -> bool:
        """Whether a run with these settings and files is this one."""
        return text == self.text and _digests(files) == self.files


def run_settings(
    text: str, files: Sequence[str] | dict[str, str], process: CoordinatorSettings, folder: Path
) -> CoordinatorSettings:
    """The settings of a run in `folder`; `files` are the names of the files that came with it.

    Raises `ConfigError`, which names what is wrong.
    """
    where = "the run's settings"
    values = toml_values(text, f"The text of {where}")
    for key in values:
        if key in CoordinatorSettings.model_fields and key not in OF_A_RUN:
            raise ConfigError(
                f"{key} in {where} is the coordinator's own, not a run's; leave it out."
            )
    known = {name.partition("/")[0].partition(".")[0]: name for name in files}
    for key in (*ONE_FILE, "adapter"):
        if (key in values) != (key in known):
            raise ConfigError(
                f"{key} in {where} and the file that came with the run belong together; "
                "`fedmezo run create` sends both."
            )
    for key, name in known.items():
        values[key] = str(folder / name.partition("/")[0])
    values["journal"] = str(folder / "journal.db")
    if process.state is not None:
        values["state"] = process.state
    return settings_of(CoordinatorSettings, values, where)


def check_files(text: str, files: Sequence[wire.RunFile]) -> None:
    """Refuse settings that are too long, and files whose names are not allowed."""
    if len(text.encode()) > SETTINGS_CHARS_MAX:
        raise ConfigError(f"The run's settings have more than {SETTINGS_CHARS_MAX} bytes.")
    names = [file.name for file in files]
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise ConfigError(f"A file of a run cannot be named {name[:64]!r}.")
    kinds = [name for name in names if not name.startswith("adapter/")]
    stems = {name.partition(".")[0] for name in kinds}
    if len(set(names)) != len(names) or len(stems) != len(kinds):
        raise ConfigError("A run has one file of each kind; two came.")


def make_folder(
    root: Path, run_id: str, text: str, files: Sequence[wire.RunFile], uploads: Uploads, by: str
) -> RunFolder:
    """Make the folder of a new run in `root`, durably and for its owner only.

    Raises `ConfigError` for a file that was not uploaded, and `OSError` if the disk refuses.
    """
    partial = root / f"{NEW}{run_id}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(mode=0o700)
        for file in files:
            uploads.place(file, partial / file.name)
        about = {"created_ms": int(1000 * time.time()), "by": by, "files": _digests(files)}
        write_private(partial / SETTINGS, text.encode())
        write_private(partial / ABOUT, json.dumps(about).encode())
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(root / run_id)
        sync(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return RunFolder(root / run_id)


def _digests(files: Sequence[wire.RunFile]) -> dict[str, str]:
    return {file.name: file.sha256.hex() for file in files}
