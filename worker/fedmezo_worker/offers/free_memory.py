"""How much memory a device has left for a further model."""

from __future__ import annotations

import sys

from fedmezo_core.service.host_memory import memory_available


def free_bytes(device: str) -> int:
    """Free bytes of the memory of `device`, as the worker's setting names it; 0: nobody says."""
    if device != "cpu":
        free = _free_on_gpu(device)
        if free is not None:
            return free
    return memory_available() or 0


def _free_on_gpu(device: str) -> int | None:
    # A worker on a form of the base does without it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    where = "cuda" if device == "auto" else device
    # torch keeps freed memory for itself, and uses it for the next model.
    kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return int(torch.cuda.mem_get_info(where)[0] + kept)
