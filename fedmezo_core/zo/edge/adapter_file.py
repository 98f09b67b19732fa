"""The adapter as the small GGUF file that llama.cpp reads, rewritten in place for each point."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.errors import ModelError
from fedmezo_core.zo.edge.array_weights import Adapter

_MODULES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of the modules of a layer."""
_IS_PERMUTED: Final = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures with these modules; whether a GGUF pairs neighbouring rows of queries and keys."""
_CORE: Final = ".core.weight"
_OUTPUTS: Final = ".outputs.weight"
_NAME: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([AB])\.[^.]+\.weight$")


@dataclass(frozen=True)
class GgufShape:
    """What a GGUF says of its model's shape."""

    architecture: str
    heads: int
    """Heads of queries."""
    key_heads: int
    """Heads of keys and values."""


class AdapterFile:
    """A GGUF file of a LoRA adapter, float32, whose matrices are overwritten."""

    def __init__(self, path: Path, start: Adapter, shape: GgufShape, *, alpha: float) -> None:
        """Write `start` to `path`; its scale is `alpha` over the rank.

        Raises `ModelError` for an architecture or a module whose place in a GGUF is not known, or
        if the package gguf is not installed.
        """
        try:
            import gguf
        except ImportError:
            raise ModelError(
                "The package gguf is missing; install fedmezo[llama-cpp] to measure with llama.cpp."
            ) from None
        check_architecture(shape.architecture)
        start = with_whole_b(start)
        self._shape = shape
        self._names = {name: gguf_name(name) for name in start}
        self.path: Final = path
        writer: Any = gguf.GGUFWriter(str(path), shape.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, value in start.items():
            writer.add_tensor(self._names[name], self._arranged(name, value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        reader: Any = gguf.GGUFReader(str(path))
        self._offsets = {one.name: int(one.data_offset) for one in reader.tensors}
        del reader  # it maps the file
        self._last: Mapping[str, npt.NDArray[np.float32]] = dict(start)

    def write(self, adapter: Adapter) -> None:
        """Overwrite the matrices that are other arrays than at the last call."""
        adapter = with_whole_b(adapter)
        with self.path.open("r+b") as file:
            for name, value in adapter.items():
                if value is not self._last[name]:
                    file.seek(self._offsets[self._names[name]])
                    file.write(self._arranged(name, value).data)
        self._last = dict(adapter)

    def _arranged(self, name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The matrix as a GGUF of the architecture has it: of queries and keys, other rows."""
        if not _IS_PERMUTED[self._shape.architecture]:
            return value
        side = self._names[name]
        heads = {
            "attn_q.weight.lora_b": self._shape.heads,
            "attn_k.weight.lora_b": self._shape.key_heads,
        }
        count = next((n for end, n in heads.items() if side.endswith(end)), None)
        if count is None:
            return value
        rows, rank = value.shape
        halves = value.reshape(count, 2, rows // count // 2, rank)
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, rank))


def with_whole_b(adapter: Adapter) -> Adapter:
    """The adapter with each B whole: where B is P C, the product takes the place of both."""
    whole: Adapter = {}
    for name, value in adapter.items():
        if name.endswith(_CORE):
            start = name.removesuffix(_CORE)
            whole[f"{start}.weight"] = adapter[start + _OUTPUTS] @ value
        elif not name.endswith(_OUTPUTS):
            whole[name] = value
    return whole


def check_architecture(architecture: str) -> None:
    """Raise `ModelError` for a GGUF of an architecture whose adapters are not known."""
    if architecture not in _IS_PERMUTED:
        raise ModelError(
            f"A GGUF of the architecture {architecture} cannot take the run's adapter; "
            f"known are {', '.join(_IS_PERMUTED)}. Measure with torch or ONNX Runtime."
        )


def gguf_name(name: str) -> str:
    """What a GGUF calls the adapter's matrix `name`; raises `ModelError` if it has no place."""
    found = _NAME.search(name)
    module = None if found is None else _MODULES.get(found[2])
    if found is None or module is None:
        raise ModelError(
            f"llama.cpp has no place for the adapter's matrix {name}; let lora.target_modules name "
            "linear layers of attention and MLPs, or measure with torch or ONNX Runtime."
        )
    return f"blk.{found[1]}.{module}.weight.lora_{found[3].lower()}"
