"""`adapter_rows`: the coordinator fits the adapter, workers and exports take it from there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmezo_core.errors import MismatchError
from tests.home.conftest import invoked
from tests.integration.conftest import model_folder
from tests.integration.support.harness import Programs, run_values

__all__ = ["model_folder"]

pytestmark = pytest.mark.slow
LORA = {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.end()


async def test_nobody_copies_the_adapter(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = run_values(rounds=2, workers_min=1, quorum=1, lora=LORA)
    journal = tmp_path / "run.db"
    coordinator, address = await programs.coordinator(
        journal, run, "--model", model_folder, "--adapter-rows", data_files[3]
    )
    worker = programs.worker(address, "w1", data_files[0], model_folder)
    assert await worker.wait() == 0, worker.said

    asked = ("--coordinator", address, "--model", model_folder)
    of_coordinator = await asyncio.to_thread(invoked, "export", tmp_path / "one", *asked)
    coordinator.end()
    of_file = invoked("export", tmp_path / "two", "--journal", journal, "--model", model_folder)
    digests = {line.split("weights digest ")[1].split(";")[0] for line in (of_coordinator, of_file)}
    assert len(digests) == 1
    assert f"weights {digests.pop().strip()}" in worker.said

    # A restart takes the fitted one, and fits no other.
    before = (tmp_path / "run.db.adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again, _ = await programs.coordinator(
        journal, run, "--model", model_folder, "--adapter-rows", data_files[3]
    )
    again.end()
    after = (tmp_path / "run.db.adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert before == after

    # A new journal begins with a fit of its own, whatever an earlier attempt has left.
    left = tmp_path / "new.db.adapter"
    left.mkdir()
    (left / "adapter_config.json").write_text("{}")
    await programs.coordinator(
        tmp_path / "new.db", run, "--model", model_folder, "--adapter-rows", data_files[3]
    )
    assert (left / "adapter_model.safetensors").is_file()

    (tmp_path / "run.db.adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(MismatchError, match="base weights"):
        invoked("export", tmp_path / "three", "--journal", journal, "--model", model_folder)
