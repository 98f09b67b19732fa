"""Whole passes that are recorded once for a shape, and then told to the device in one launch.

A pass of prepared launches (`PreparedPass`) does the same each time, on what lies in the same
memory: seeds, coefficients, and the batch, which is copied into memory of the recording's own. On a
CUDA device such a recording is a CUDA graph.

A recording is trusted once it has given, at other seeds and on another batch, the bits that plain
launches give. Where it does not, or where a pass cannot be recorded, a warning says so once, and
plain launches go on.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import nn

from fedmezo_core.zo import devices
from fedmezo_core.zo.data.task import Batch

log = logging.getLogger("fedmezo.graphs")

GRAPHS_MAX: Final = 16
"""Recordings that are kept, one for each shape of a batch and number of points."""

RECORDED_TOKENS_MAX: Final = 4000
"""Tokens, those of all copies together, of a pass that is recorded: a larger one keeps the device
busy while the host goes on."""

Work = Callable[[Batch], torch.Tensor]
_FIELDS: Final = ("input_ids", "attention_mask", "position_ids", "labels", "targets")


class Recorder(Protocol):
    """Records what a device is told to do, to tell it again at once."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """(what does `work` again, its result, which that overwrites). Raises if it cannot."""


class CudaGraphs:
    """Records CUDA graphs, which share the memory of what they compute in between."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """Graphs that use the shared memory; when the last one is gone, torch gives it up."""
        self._pool: Any = None
        self._stream: Any = None

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """As `Recorder` says. `work` has run before, so nothing is compiled now."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # Torch's own is on the first device that recorded anything.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        except Exception:
            # A recording that fails leaves the thread on the stream that it was made on.
            torch.cuda.set_stream(stream)
            _end_failed_recording(stream.device_index, self._pool)
            raise
        self._alive.add(graph)
        return graph.replay, result


def _end_failed_recording(device: int, pool: Any) -> None:
    """Tell torch's allocator that nothing is recorded into `pool` any longer.

    Where an operation waited for the device, torch leaves that out. From then on it could free no
    cached memory: `empty_cache` would fail, and so would allocations that need it.
    """
    ends = [
        getattr(torch._C, name, None)
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # torch 2.6
    ]
    for end in filter(None, ends):
        try:
            end(device, pool)
        except RuntimeError:
            return  # torch has done it
        torch._C._cuda_releasePool(device, pool)
        return


@dataclass(eq=False)
class _Recording:
    """One shape's pass."""

    batch: Batch | None = None
    """The memory that the recording reads; None before the pass is recorded."""
    replay: Callable[[], object] = lambda: None
    result: torch.Tensor | None = None
    trusted: bool = False


class Graphs:
    """The recorded passes of one model."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    @property
    def active(self) -> bool:
        """Whether passes are recorded: no longer once one could not be."""
        return self._recorder is not None

    def run(self, prepared: object, batch: Batch, work: Work) -> torch.Tensor:
        """`work(batch)`, a float64 tensor that the next call may overwrite.

        work: launches from `prepared` and torch's operations, which wait for nothing and depend on
        the batch's tensors and on device memory alone. The first call for a shape runs it plainly,
        the second one also records it, the third one compares both.
        """
        key = (prepared, *(getattr(batch, name).shape for name in _FIELDS))
        recording = self._recordings.pop(key, None)
        if self._recorder is None:
            return work(batch)
        if recording is None:
            result = work(batch)
            recording = _Recording()
        elif recording.batch is None:
            if not self._record(recording, batch, work):
                return work(batch)
            result = work(batch)
        else:
            assert recording.result is not None
            for name in _FIELDS:
                getattr(recording.batch, name).copy_(getattr(batch, name), non_blocking=True)
            recording.replay()
            result = recording.result
            if not recording.trusted:
                replayed, result = result.clone(), work(batch)
                if not torch.equal(replayed.view(torch.int64), result.view(torch.int64)):
                    self._give_up("a recorded pass gives other losses than plain launches")
                    return result
                recording.trusted = True
        while len(self._recordings) >= GRAPHS_MAX:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording
        return result

    def _record(self, recording: _Recording, batch: Batch, work: Work) -> bool:
        assert self._recorder is not None
        own = replace(batch, **{name: getattr(batch, name).clone() for name in _FIELDS})
        try:
            recording.replay, recording.result = self._recorder.record(lambda: work(own))
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            return False
        recording.batch = own
        return True

    def give_up_memory(self) -> bool:
        """Record nothing any longer, because memory ran out; False if that was so already."""
        was_active = self.active
        if was_active:
            self._give_up("memory ran out, and recordings have some of their own")
        return was_active

    def _give_up(self, reason: str) -> None:
        self._recorder = None
        self._recordings.clear()
        log.warning(
            "Passes over this model are not recorded as CUDA graphs, so that a small model waits "
            "for the host: %s.",
            reason,
        )


def recorder_for(model: nn.Module) -> Recorder | None:
    """Records passes over `model`; None if it is not on a CUDA device as a whole, with kernels."""
    places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1 or next(iter(places)).type != "cuda":
        return None
    return None if devices.kernels(next(iter(places))) is None else CudaGraphs()


def padded(batch: Batch) -> Batch:
    """`batch` with more padding, so that few shapes come, each of which is recorded once."""
    tokens, response_tokens = padded_length(batch.input_ids.shape[1]), batch.targets.shape[1]
    if response_tokens:
        # A token's logits come from the position before it.
        response_tokens = min(padded_length(response_tokens), tokens - 1)
    return batch.padded(tokens, response_tokens)


def padded_length(tokens: int) -> int:
    """A length for batches of `tokens`: one of few, and larger, so that every row has padding.

    A model that sees no padding may compute without a mask, and a recording always has one. So both
    have it. The length is larger by 8 tokens at most, or by an eighth.
    """
    step = max(8, 1 << max(0, tokens.bit_length() - 4))
    return tokens + step - tokens % step
