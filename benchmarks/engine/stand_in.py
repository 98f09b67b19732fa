"""A CUDA device that is not there: the host's work of the CUDA path, on a machine without a GPU.

Tensors are the CPU's, but `devices` takes them for another device's, and Triton gets a driver whose
kernels do nothing. Everything before the driver's call is the product's and Triton's own: checks,
tables, Triton's dispatcher, its launcher. The driver's call itself only counts, and writes zeros
where the kernel would write weights, because what memory happens to hold may be slow to compute
with. Torch's operations are its CPU kernels, which on tensors of a few kilobytes take about the
time that a GPU's launches take the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fedmezo_core.zo import devices
from fedmezo_core.zo.noise import triton_kernels

_FLOAT32: Final = triton_kernels.FLOAT32.value


class StandIn:
    """Counts what would be launched."""

    def __init__(self) -> None:
        self.launches = 0
        """Kernels of ours since this was last set to 0."""
        self._written: set[tuple[Any, ...]] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """While open, the CPU counts as a CUDA device. Triton must not interpret."""
        assert isinstance(triton_kernels.fan, triton.JITFunction), "TRITON_INTERPRET is 1"
        driver = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            launcher_cls=nvidia.CudaLauncher,
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": 232_448},
                load_binary=lambda name, kernel, shared, device: (name, name, 255, 0, 1024),
                build_signature_metadata=lambda signature: signature,
                launch=self._launch,
            ),
        )
        with (
            mock.patch.object(triton.runtime.driver, "_active", driver),
            mock.patch.object(nvidia, "PyKernelArg", dict),
            mock.patch.object(devices, "elsewhere", _elsewhere),
            mock.patch.object(devices, "kernels", _kernels),
        ):
            yield

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """As a `Recorder` of passes: a recording is one launch, and leaves the result as it is."""
        result = work().clone()

        def replay() -> None:
            self.launches += 1

        return replay, result

    def _launch(self, *arguments: Any) -> None:
        """What Triton's launcher does in C: it asks each pointer argument for its address."""
        x, y, z, _, name, *_, types, values = arguments
        values = [value.data_ptr() if hasattr(value, "data_ptr") else value for value in values]
        self.launches += 1
        # What is built lies where it lay before, but for looked up rows.
        if name == "look_up" or tuple(values) not in self._written:
            self._written.add(tuple(values))
            kernel = getattr(triton_kernels, name)
            of = dict(zip(kernel.arg_names, values, strict=True))
            width = 4 if "*fp32" in types or of.get("STORAGE") == _FLOAT32 else 2
            for address, count in _outputs(name, of, (x, y, z), width):
                ctypes.memset(address, 0, count)


# Functions, because a mock object would take longer than what it stands in for.


def _elsewhere(_: torch.device) -> bool:
    return True


def _kernels(_: torch.device) -> ModuleType:
    return triton_kernels


def _outputs(
    name: str, of: dict[str, Any], grid: tuple[int, int, int], width: int
) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what a launch of kernel `name` with the arguments `of` would write.

    width: bytes of an element.
    """
    if name == "look_up":
        yield of["out"], grid[0] * grid[2] * of["columns"] * width
        return
    if name == "signs":
        lines = (ctypes.c_int64 * 4 * grid[0]).from_address(of["tensors"])
        index = (ctypes.c_int32 * grid[0]).from_address(of["owners"])[-1]
        _, offset, _, length = lines[index]
        yield of["out"], (offset + grid[1] * of["RANK"] * length) * width
        return
    pairs, draws = (ctypes.c_int32 * 2).from_address(of["table"])
    points = ctypes.c_int32.from_address(of["table"] + 16 * (pairs + draws) + 12).value
    if name == "fan":
        for point in range(points):
            yield of["out"] + point * of["stride"] * width, of["size"] * width
        return
    count = (ctypes.c_int32 * grid[0]).from_address(of["owners"])[-1] + 1
    for line in (ctypes.c_int64 * 8 * count).from_address(of["tensors"]):
        yield line[1], points * line[4] * width
