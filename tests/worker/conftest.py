"""The tiny model and data of the tests of whole runs."""

from __future__ import annotations

from tests.integration.conftest import (
    data_files,
    heldout_file,
    model_folder,
    one_torch_thread,
    programs,
    tiny_genesis,
    workers,
)

__all__ = [
    "data_files",
    "heldout_file",
    "model_folder",
    "one_torch_thread",
    "programs",
    "tiny_genesis",
    "workers",
]
