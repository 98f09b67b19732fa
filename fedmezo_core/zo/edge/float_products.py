"""Products by a GGUF's weights in float32, where llama.cpp would round their inputs to 8 bits.

llama.cpp calls back after each node of its graph that the caller asks for. So the product of a
weight and its inputs is computed a second time, by ggml's own operations, from the weight as
float32, and replaces the first.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Final

import numpy as np

from fedmezo_core.errors import MeasurementError, ModelError

log = logging.getLogger("fedmezo.worker")

_FLOAT32: Final = 0
"""ggml's number of the type."""
_PART_FLOATS: Final = 1 << 20
"""Weights that exist as float32 at a time (4 MiB), if few rows have no more."""
_ROWS_TOGETHER: Final = 16
"""Of so many rows for each thread, or a multiple, ggml's product in float32 is 3 times as fast."""
_MORE_BYTES: Final = 1 << 20
"""What ggml needs beside the numbers: its graph and its work memory for one thread."""


class _Tensor(ctypes.Structure):
    """The head of `struct ggml_tensor`, whose layout `FloatProducts` checks before it reads one."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class FloatProducts:
    """Replaces the products of a llama.cpp context that are on the CPU and not yet float32."""

    def __init__(self, *, threads: int) -> None:
        """Raise `ModelError` for a llama-cpp-python whose tensors have another layout than known.

        threads: how many compute.
        """
        from llama_cpp import llama_cpp

        self._threads = threads
        self._memory = np.empty(0, dtype=np.uint8)
        self._error: Exception | None = None
        self._ggml = self._known_ggml()
        self.callback: Final[Any] = llama_cpp.ggml_backend_sched_eval_callback(self._called)
        """For `cb_eval` of a context's parameters; valid as long as this object."""

    def check(self) -> None:
        """Raise `MeasurementError` if a product could not be computed since the last call."""
        error, self._error = self._error, None
        if error is not None:
            log.warning("a product failed: %s", error)
            raise MeasurementError(
                f"llama.cpp could not compute a product in float32 ({type(error).__name__}); see "
                "its memory."
            ) from error

    def _known_ggml(self) -> Any:
        """The library, after a product that shows its tensors' layout."""
        try:
            from llama_cpp._ggml import libggml

            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            for name, result, arguments in (
                ("ggml_init", pointer, (_ContextParameters,)),
                ("ggml_free", None, (pointer,)),
                ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, *(ctypes.c_int64,) * 2)),
                ("ggml_view_tensor", pointer, (pointer, pointer)),
                ("ggml_view_2d", pointer, (pointer, pointer, *(ctypes.c_int64,) * 2, size, size)),
                ("ggml_cast", pointer, (pointer, pointer, ctypes.c_int)),
                ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
                ("ggml_new_graph", pointer, (pointer,)),
                ("ggml_build_forward_expand", None, (pointer, pointer)),
                ("ggml_graph_compute_with_ctx", ctypes.c_int, (pointer, pointer, ctypes.c_int)),
                ("ggml_backend_buffer_is_host", ctypes.c_bool, (pointer,)),
            ):
                function = getattr(libggml, name)
                function.restype, function.argtypes = result, arguments
        except (ImportError, AttributeError) as error:
            raise ModelError(_unknown(str(error))) from None
        context = libggml.ggml_init(_ContextParameters(_MORE_BYTES, None, True))
        try:
            weight = libggml.ggml_new_tensor_2d(context, _FLOAT32, 32, 5)
            inputs = libggml.ggml_new_tensor_2d(context, _FLOAT32, 32, 7)
            product = _at(libggml.ggml_mul_mat(context, weight, inputs))
            whole = libggml.ggml_view_tensor(context, weight)
            known = (
                product.src[0] == weight
                and product.src[1] == inputs
                and product.src[2] is None
                and (*product.ne,) == (5, 7, 1, 1)
                and (*product.nb,) == (4, 20, 140, 140)
                and product.type == _FLOAT32
                and product.data is None
                and _at(whole).view_src == weight
                and _at(whole).op != product.op
                and _at(whole).name.endswith(b" (view)")
            )
            self._product = product.op
        finally:
            libggml.ggml_free(context)
        if not known:
            raise ModelError(_unknown("its tensors have another layout"))
        return libggml

    def _called(self, pointer: int, ask: bool, _data: object) -> bool:
        """Whether the node is wanted (`ask`), then the node as computed; True goes on."""
        try:
            node = _at(pointer)
            if not self._is_rounded(node):
                return not ask
            if not ask and self._error is None:
                self._replace(node)
        except Exception as error:  # none may pass through llama.cpp's own frames
            self._error = error
        return True

    def _is_rounded(self, node: _Tensor) -> bool:
        """Whether a node is a product by weights that are not float32, in this memory."""
        if node.op != self._product:
            return False
        weight, inputs = _at(node.src[0]), _at(node.src[1])
        return (
            weight.type != _FLOAT32
            and inputs.type == _FLOAT32
            and node.ne[2] * node.ne[3] == 1
            and all(
                one.buffer and self._ggml.ggml_backend_buffer_is_host(one.buffer)
                for one in (node, weight, inputs)
            )
        )

    def _replace(self, node: _Tensor) -> None:
        ggml, weight = self._ggml, _at(node.src[0])
        columns, rows, _, _ = weight.ne
        tokens, row_bytes = node.ne[1], weight.nb[1]
        # In a GGUF's order, a tensor's first length is that of its innermost dimension.
        found = _floats(node.data, tokens, rows)
        unit = _ROWS_TOGETHER * self._threads
        count = min(rows, max(1, _PART_FLOATS // columns // unit) * unit)
        numbers = count * columns + count * tokens + self._threads * (columns + 64)
        self._hold(4 * numbers + _MORE_BYTES)
        for first in range(0, rows, count):
            some = min(count, rows - first)
            context = ggml.ggml_init(
                _ContextParameters(self._memory.size, self._memory.ctypes.data, False)
            )
            try:
                part = ggml.ggml_view_2d(
                    context, node.src[0], columns, some, row_bytes, first * row_bytes
                )
                # A view of the inputs, because a graph also computes what its tensors come from.
                product = ggml.ggml_mul_mat(
                    context,
                    ggml.ggml_cast(context, part, _FLOAT32),
                    ggml.ggml_view_tensor(context, node.src[1]),
                )
                graph = ggml.ggml_new_graph(context)
                ggml.ggml_build_forward_expand(graph, product)
                status = ggml.ggml_graph_compute_with_ctx(context, graph, self._threads)
                if status:
                    raise MemoryError(f"status {status}")
                found[:, first : first + some] = _floats(_at(product).data, tokens, some)
            finally:
                ggml.ggml_free(context)

    def _hold(self, size: int) -> None:
        if self._memory.size < size:
            self._memory = np.empty(size, dtype=np.uint8)


def _at(pointer: int) -> _Tensor:
    return ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents


def _floats(address: int, rows: int, columns: int) -> Any:
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (rows, columns))


def _unknown(reason: str) -> str:
    return (
        f"This version of llama-cpp-python cannot be told to compute in float32 ({reason}); "
        "install version 0.3.36, or measure with ONNX Runtime or torch."
    )
