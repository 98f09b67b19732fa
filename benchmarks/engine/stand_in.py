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
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fedmezo_core.zo import devices
from fedmezo_core.zo.noise import triton_kernels


class StandIn:
    """Counts what would be launched."""

    def __init__(self) -> None:
        self.launches = 0
        """Kernels of ours since this was last set to 0."""

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

    def _launch(self, *arguments: Any) -> None:
        """What Triton's launcher does in C: it asks each pointer argument for its address."""
        _, rows, _, _, name, *_, types, values = arguments
        values = [value.data_ptr() if hasattr(value, "data_ptr") else value for value in values]
        self.launches += 1
        kernel = getattr(triton_kernels, name)
        width = 4 if types[0] == "*fp32" else 2
        _write_zeros(dict(zip(kernel.arg_names, values, strict=True)), rows, width)


# Functions, because a mock object would take longer than what it stands in for.


def _elsewhere(_: torch.device) -> bool:
    return True


def _kernels(_: torch.device) -> ModuleType:
    return triton_kernels


def _write_zeros(of: dict[str, Any], rows: int, width: int) -> None:
    """Write zeros to the outputs, `width` bytes wide, of a kernel with the arguments `of`."""
    outputs, count, stride = 1, 0, 0
    if "DOMAIN" in of:
        count = rows * of["RANK"] * of["length"]
    elif "draws" in of:
        count, stride = rows * of["columns"] if of["LOOKUP"] else of["size"], of["stride"]
        last_draw = 4 * (4 * (of["pairs"] + of["draws"] - 1) + 3)
        outputs = ctypes.c_int32.from_address(of["table"] + last_draw).value if of["draws"] else 1
    for output in range(outputs):
        ctypes.memset(of["out"] + output * stride * width, 0, count * width)
