"""What reads files that others have written, or that lie where others can write."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.taking_home.rebuilding import plan_of
from fedmezo_coordinator.runs.run_folder import ABOUT, SETTINGS, RunFolder
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.config import LoraConfig
from fedmezo_core.journal.high_water import read_mark
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.signed_heads import open_signer
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.zo.data.rows import read_raw_examples
from fedmezo_core.zo.model.adapter_layout import CONFIG_FILE, WEIGHTS_FILE
from fedmezo_core.zo.model.run_file import RUN_FILE, read_run_file
from fedmezo_core.zo.plain.entries import Entry, Manifest
from fedmezo_worker.worker_settings import WorkerSettings
from tests.fuzz.trust_targets import folder

PART: Final = b"\n<next file>\n"
"""Between the files of an input that holds two."""
LORA: Final = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
MANIFEST: Final = Manifest(
    (
        Entry(0, "q_proj.lora_A.weight", (2, 4), "float32"),
        Entry(1, "q_proj.lora_B.weight", (3, 2), "float32"),
    )
)
ROW_ENDINGS: Final = (".jsonl", ".csv")
"""The first byte of an input of rows is the number of one."""


@cache
def _folder_of(name: str) -> Path:
    made = folder() / name
    made.mkdir()
    return made


def _write(name: str, data: bytes, *files: str) -> Path:
    """Write the parts of `data` to these files of a folder."""
    where = _folder_of(name)
    parts = data.split(PART, len(files) - 1)
    for file, part in zip(files, [*parts, b""], strict=False):
        (where / file).write_bytes(part)
    return where


def read_run_folder(data: bytes) -> None:
    """A run's folder at a coordinator's start: what is said of it, and its settings as given."""
    path = _write("run", data, ABOUT, SETTINGS)
    process = CoordinatorSettings(runs=path.parent)
    settings = RunFolder(path).settings(process)
    settings.run_config("the run")


def read_worker_settings(data: bytes) -> None:
    """A worker's settings file, with its policy and its data sets."""
    path = _folder_of("worker") / "worker.toml"
    path.write_bytes(data)
    load_settings(WorkerSettings, ["--config", str(path)], program="fuzz")


def read_journal_file(data: bytes) -> None:
    """A journal that somebody was given as a file, as `fedmezo rebuild` reads it."""
    path = _folder_of("journal-file") / "journal.db"
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(data)
    store = open_store(str(path), read_only=True)
    try:
        plan_of(Journal(store), None)
    finally:
        store.close()


def read_journal_mark(data: bytes) -> None:
    """The mark beside a journal."""
    path = _folder_of("mark") / "journal.db.mark"
    path.write_bytes(data)
    read_mark(path)


def read_signing_key(data: bytes) -> None:
    """The key beside a journal."""
    path = _folder_of("signing-key") / "journal.db.key"
    path.write_bytes(data)
    open_signer(path)


def read_adapter_files(data: bytes) -> None:
    """The adapter that a run begins from, which workers have from their coordinator."""
    # Imported here: it takes torch, which the others do without.
    from fedmezo_core.zo.model.adapters import read_adapter

    read_adapter(_write("adapter", data, CONFIG_FILE, WEIGHTS_FILE), LORA, MANIFEST)


def read_export(data: bytes) -> None:
    """What an export remembers of its run."""
    read_run_file(_write("export", data, RUN_FILE))


def read_row_file(data: bytes) -> None:
    """A file of rows."""
    ending = ROW_ENDINGS[data[0] % len(ROW_ENDINGS) if data else 0]
    path = _folder_of("rows") / f"rows{ending}"
    path.write_bytes(data[1:])
    read_raw_examples(path)
