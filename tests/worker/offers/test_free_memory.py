"""How much memory a device has left, as a container's limit and a GPU's allocator see it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmezo_core.service import host_memory
from fedmezo_core.service.host_memory import memory_available
from fedmezo_worker.offers.free_memory import free_bytes

GIB = 1 << 30


@pytest.fixture(autouse=True)
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control group of a machine with 8 GiB free, in no container."""
    (machine := tmp_path / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"
    )
    monkeypatch.setattr(host_memory, "_MACHINE", machine)
    monkeypatch.setattr(host_memory, "_GROUP", tmp_path)
    return tmp_path


def limit(group: Path, limit: str, used: int, inactive: int) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


@pytest.mark.parametrize(
    ("most", "used", "inactive", "free"),
    [
        (str(4 * GIB), 3 * GIB, GIB, 2 * GIB),
        ("max", 3 * GIB, GIB, 8 * GIB),
        (str(64 * GIB), GIB, 0, 8 * GIB),
        (str(GIB), GIB, 0, 0),
    ],
)
def test_the_limit_of_a_container_counts(
    group: Path, most: str, used: int, inactive: int, free: int
) -> None:
    assert free_bytes("cpu") == 8 * GIB
    limit(group, most, used, inactive)
    assert free_bytes("cpu") == memory_available() == free


def test_what_torch_keeps_of_a_gpu_is_free_for_the_next_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda where: (5 * GIB, 80 * GIB),
        memory_reserved=lambda where: 3 * GIB,
        memory_allocated=lambda where: GIB,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert free_bytes("auto") == free_bytes("cuda:1") == 7 * GIB
    assert free_bytes("cpu") == 8 * GIB
