"""The device that a model computes on, and where weights are that do not fit its memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fedmezo_core.errors import ConfigError, ModelError

FREE_MEMORY_SHARE: Final = 0.9
"""Share of the free memory that weights may take by default; the rest is for activations."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a party keeps its weights. It changes none of their bits."""

    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`; `auto`: the first CUDA device if there is one, else the CPU."""
    device_memory_max_bytes: int | None = None
    """Memory of the device that weights may take; None for `FREE_MEMORY_SHARE` of what is free.
    Other weights are in the machine's memory (for a CUDA device) or in `offload_folder`, and are
    copied to the device layer by layer."""
    offload_folder: Path | None = None
    """Folder on a disk for weights that do not fit into memory; without it they are an error."""

    def torch_device(self) -> torch.device:
        """The device for torch. Raises `ConfigError` if this machine does not have it."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "auto":
            return torch.device("cuda", 0) if count else torch.device("cpu")
        kind, _, number = self.device.partition(":")
        if kind == "cpu" and not number:
            return torch.device("cpu")
        if kind != "cuda" or (number and not number.isdecimal()):
            raise ConfigError(
                f"device: {self.device!r} is no device; use auto, cpu, cuda or cuda:1, for example."
            )
        index = int(number or 0)
        if index >= count:
            have = "has no CUDA device" if count == 0 else f"has CUDA devices 0 to {count - 1}"
            raise ConfigError(
                f"device: there is no {self.device}, because this machine, as PyTorch sees it, "
                f"{have}; use auto or cpu, or install PyTorch's CUDA build."
            )
        return torch.device("cuda", index)

    @contextmanager
    def loading(self) -> Iterator[dict[str, Any]]:
        """While open, give the arguments of `from_pretrained` that place a model.

        Files that transformers writes into the offload folder are removed at the end. Raises
        `ConfigError` for a device that does not exist or a folder that cannot be written to.
        """
        device = self.torch_device()
        if (
            device.type == "cpu"
            and self.device_memory_max_bytes is None
            and not self.offload_folder
        ):
            yield {"device_map": None}
            return
        arguments: dict[str, Any] = {"device_map": "auto", "max_memory": self._memory_max(device)}
        if self.offload_folder is None:
            yield arguments
            return
        try:
            self.offload_folder.mkdir(parents=True, exist_ok=True)
            own = Path(tempfile.mkdtemp(prefix="fedmezo-loading-", dir=self.offload_folder))
        except OSError as error:
            raise ConfigError(
                f"offload_folder: cannot write to {self.offload_folder} ({error.strerror}); name a "
                "folder that this user can write to."
            ) from error
        try:
            yield {**arguments, "offload_folder": str(own)}
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def check(self, shown: str, model: nn.Module) -> None:
        """Raise `ModelError` if weights have no room, or the device holds none of them.

        Messages call `model` by the name `shown`.
        """
        # transformers gives no map to a model that is on a single device.
        device_map: dict[str, Any] = getattr(model, "hf_device_map", {})
        everywhere = device_map.values() or [weight.device.type for weight in model.parameters()]
        devices = {str(device) for device in everywhere}
        if "disk" in devices and self.offload_folder is None:
            raise ModelError(
                f"The weights of {shown} do not fit into the memory that they may take; name an "
                "offload_folder on a disk, or raise device_memory_max."
            )
        if self.torch_device().type != "cpu" and devices <= {"cpu", "disk"}:
            raise ModelError(
                f"The device's memory holds no layer of {shown}; raise device_memory_max, free "
                "memory on the device, or use device = cpu."
            )

    def _memory_max(self, device: torch.device) -> dict[int | str, int]:
        import psutil  # only here: where everything has room, nobody needs it

        key: int | str = "cpu" if device.type == "cpu" else device.index
        free = {"cpu": int(psutil.virtual_memory().available * FREE_MEMORY_SHARE)}
        memory: dict[int | str, int] = {}
        if self.device_memory_max_bytes is not None:
            memory[key] = self.device_memory_max_bytes
        elif device.type != "cpu":
            memory[key] = int(torch.cuda.mem_get_info(device)[0] * FREE_MEMORY_SHARE)
        return {**memory, **{name: size for name, size in free.items() if name not in memory}}
