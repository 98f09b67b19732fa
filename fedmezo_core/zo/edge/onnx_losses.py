"""Losses from ONNX Runtime: a graph of the base whose adapter is among its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from fedmezo_core.errors import ModelError
from fedmezo_core.zo.edge.array_losses import EdgeBatch
from fedmezo_core.zo.edge.array_weights import Adapter
from fedmezo_core.zo.edge.base_form import BaseForm

GRAPH_INPUTS: Final = ("input_ids", "attention_mask", "position_ids", "rows", "columns")
"""The graph's inputs beside the adapter's matrices, all int64: three [rows, tokens], padded on the
left, and two [places], which say where the logits are wanted."""
GRAPH_OUTPUT: Final = "logits"
"""The graph's output: float32 [places, vocabulary]."""


class OnnxLosses:
    """Gives the losses of batches at adapters; see `edge_engine.Losses`."""

    def __init__(self, form: BaseForm, *, threads: int | None = None) -> None:
        """Load the graph of `form` for a CPU, to compute in `threads` threads (default: all cores).

        Raises `ModelError` if ONNX Runtime is not installed or refuses the graph.
        """
        try:
            import onnxruntime
        except ImportError:
            raise ModelError(
                "The package onnxruntime is missing; install fedmezo[onnx] to measure with it."
            ) from None
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(form.model_path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime has types of its own for each failure
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"ONNX Runtime cannot load {form.model_path} ({reason}).") from None
        self._verbalizer_ids = form.encoder.verbalizer_ids
        inputs = {one.name for one in self._session.get_inputs()}
        wanted = {*GRAPH_INPUTS, *form.start}
        if inputs - wanted:
            raise ModelError(
                f"The graph {form.model_path} has an input {min(inputs - wanted)}, which no worker "
                "gives; export the form again."
            )
        self._inputs = inputs
        """An exporter may leave out inputs on which nothing depends."""

    def __call__(self, adapters: Iterable[Adapter], batch: EdgeBatch) -> list[float]:
        """The mean loss of `batch` in nats at each of `adapters`."""
        feeds = [
            {
                "input_ids": part.padded.input_ids,
                "attention_mask": part.padded.attention_mask,
                "position_ids": part.padded.position_ids,
                "rows": part.rows,
                "columns": part.columns,
            }
            for part in batch.parts
        ]
        losses: list[float] = []
        for adapter in adapters:
            total = 0.0
            for part, feed in zip(batch.parts, feeds, strict=True):
                given: dict[str, Any] = {**feed, **adapter}
                named = {name: value for name, value in given.items() if name in self._inputs}
                [logits] = self._session.run([GRAPH_OUTPUT], named)
                total += part.loss_sum(np.asarray(logits), self._verbalizer_ids)
            losses.append(total / batch.target_count)
        return losses
