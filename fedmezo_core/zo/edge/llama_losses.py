"""Losses from llama.cpp: a GGUF base, quantised or not, and an adapter that is loaded anew."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.errors import MeasurementError, ModelError
from fedmezo_core.zo.edge.adapter_file import AdapterFile, GgufShape
from fedmezo_core.zo.edge.array_losses import EdgeBatch, PassRows
from fedmezo_core.zo.edge.array_weights import Adapter
from fedmezo_core.zo.edge.base_form import BaseForm
from fedmezo_core.zo.edge.edge_engine import PASS_TOKENS_MAX
from fedmezo_core.zo.edge.float_products import FloatProducts

_FLOAT32: Final = 0
"""ggml's number of the type."""
_NO_FLASH_ATTENTION: Final = 0


class LlamaLosses:
    """Gives the losses of batches at adapters; see `edge_engine.Losses`.

    Adapter and products are float32; the weights of the base are as the GGUF quantises them.
    """

    def __init__(self, form: BaseForm, *, threads: int | None = None, gpu_layers: int = 0) -> None:
        """Load the GGUF of `form`; `gpu_layers` of it go to a GPU that llama.cpp was built for.

        threads: how many compute (default: llama.cpp's own number). Raises `ModelError` if
        llama-cpp-python is not installed, or cannot read the file or put the adapter into it.
        """
        try:
            from llama_cpp import llama_cpp
        except ImportError:
            raise ModelError(
                "The package llama-cpp-python is missing; install fedmezo[llama-cpp] to measure "
                "with it."
            ) from None
        self._library: Any = llama_cpp
        self._verbalizer_ids = form.encoder.verbalizer_ids
        self._tokens_max = max(PASS_TOKENS_MAX, form.encoder.config.tokens_max)
        self._held = contextlib.ExitStack()
        """Gives back what Python does not know of, the last first."""
        weakref.finalize(self, self._held.close)
        self._quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = gpu_layers
        # A second, rearranged copy of the weights would be as large as the file.
        of_model.use_extra_bufts = False
        self._model: Any = llama_cpp.llama_model_load_from_file(
            str(form.model_path).encode(), of_model
        )
        if not self._model:
            raise ModelError(
                f"llama.cpp cannot load {form.model_path}: the file is damaged, or this version "
                "does not know its architecture; install a newer llama-cpp-python, or export the "
                "form from another GGUF."
            )
        self._held.callback(llama_cpp.llama_model_free, self._model)
        self._vocabulary_size = int(
            llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        )
        if self._vocabulary_size != form.description.vocabulary_size:
            raise ModelError(
                f"{form.model_path} has {self._vocabulary_size} tokens, the run's base "
                f"{form.description.vocabulary_size}; export the form from a GGUF of the same base."
            )
        parameters = self._parameters(threads)
        self._products = FloatProducts(threads=int(parameters.n_threads_batch))
        parameters.cb_eval = self._products.callback
        self._context: Any = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ModelError(
                f"llama.cpp has no memory for a context of {self._tokens_max} tokens; free some, "
                "or begin a run with a smaller task.tokens_max."
            )
        self._held.callback(llama_cpp.llama_free, self._context)
        # In memory and without a name, so that nothing is left of it, whatever ends the process.
        memory = os.memfd_create("fedmezo-adapter")
        self._held.callback(os.close, memory)
        self._file = AdapterFile(
            Path(f"/proc/self/fd/{memory}"),
            dict(form.start),
            self._shape(),
            alpha=form.description.alpha,
        )

    def __call__(self, adapters: Iterable[Adapter], batch: EdgeBatch) -> list[float]:
        """The mean loss of `batch` in nats at each of `adapters`."""
        return [self._at(adapter, batch) / batch.target_count for adapter in adapters]

    def close(self) -> None:
        """Free the memory of model and adapter, as the end of the object does; then of no use."""
        self._held.close()

    def _parameters(self, threads: int | None) -> Any:
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self._tokens_max
        parameters.n_seq_max = min(
            self._tokens_max, int(self._library.llama_max_parallel_sequences())
        )
        parameters.kv_unified = True
        parameters.type_k = parameters.type_v = _FLOAT32
        parameters.flash_attn_type = _NO_FLASH_ATTENTION
        parameters.no_perf = True
        if threads is not None:
            parameters.n_threads = parameters.n_threads_batch = threads
        self._rows_max = int(parameters.n_seq_max)
        return parameters

    def _shape(self) -> GgufShape:
        text = ctypes.create_string_buffer(128)
        self._library.llama_model_meta_val_str(
            self._model, b"general.architecture", text, len(text)
        )
        return GgufShape(
            text.value.decode(),
            int(self._library.llama_model_n_head(self._model)),
            int(self._library.llama_model_n_head_kv(self._model)),
        )

    def _at(self, adapter: Adapter, batch: EdgeBatch) -> float:
        library = self._library
        self._file.write(adapter)
        loaded = library.llama_adapter_lora_init(self._model, str(self._file.path).encode())
        if not loaded:
            raise MeasurementError(
                "llama.cpp cannot load the adapter; the GGUF has other layers than the run's base."
            )
        try:
            one = (type(loaded) * 1)(loaded)
            library.llama_set_adapters_lora(self._context, one, 1, (ctypes.c_float * 1)(1.0))
            return sum(
                part.loss_sum(self._logits(part), self._verbalizer_ids) for part in batch.parts
            )
        finally:
            library.llama_set_adapters_lora(self._context, None, 0, None)
            library.llama_adapter_lora_free(loaded)

    def _logits(self, part: PassRows) -> npt.NDArray[np.float32]:
        """Logits [places, vocabulary] of one part of a batch, without its padding."""
        library, padded = self._library, part.padded
        wanted = np.zeros(padded.input_ids.shape, dtype=bool)
        wanted[part.rows, part.columns] = True
        real = padded.attention_mask.astype(bool)
        rows, _ = np.nonzero(real)
        count = len(rows)
        if len(real) > self._rows_max or count > self._tokens_max:
            raise MeasurementError(
                "A batch has more rows or tokens than llama.cpp takes at a time; use a smaller "
                "batch_size."
            )
        pass_ = library.llama_batch_init(count, 0, 1)
        try:
            pass_.n_tokens = count
            ids, positions = padded.input_ids[real], padded.position_ids[real]
            asked = wanted[real]
            for index in range(count):
                pass_.token[index] = int(ids[index])
                pass_.pos[index] = int(positions[index])
                pass_.n_seq_id[index] = 1
                pass_.seq_id[index][0] = int(rows[index])
                pass_.logits[index] = bool(asked[index])
            library.llama_memory_clear(library.llama_get_memory(self._context), True)
            if library.llama_decode(self._context, pass_) != 0:
                raise MeasurementError("llama.cpp could not compute a batch; see its memory.")
            self._products.check()
            # In the order of the tokens that asked for them, which is that of the places.
            found = library.llama_get_logits(self._context)
            shape = (int(asked.sum()), self._vocabulary_size)
            logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape).copy()
            return logits
        finally:
            library.llama_batch_free(pass_)
