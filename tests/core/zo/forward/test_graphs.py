"""Recorded passes give the losses of plain ones, or are not used, which one warning says."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.graphs import CudaGraphs, Graphs, Recorder, padded, padded_length
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.measurements import Pair
from tests.core.zo.forward.frozen_parts import EPS, LOCAL, batch_of, losses_of, task_of
from tests.core.zo.forward.test_prepared import on_a_device

LOCAL_PAIRS: list[list[Pair]] = [[], LOCAL, [(3, 0.01), (4, 0.01)], [(k, 0.01) for k in (5, 6)]]


class Replays:
    """Records a pass by keeping what computes it, in the memory that it was recorded with."""

    def __init__(self, *, stale: bool = False, fails: bool = False) -> None:
        self.records = self.replays = 0
        self._stale, self._fails = stale, fails

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        self.records += 1
        if self._fails:
            raise torch.OutOfMemoryError("no room for another shape")
        result = work().clone()

        def replay() -> None:
            self.replays += 1
            if not self._stale:
                with torch.inference_mode():
                    result.copy_(work())

        return replay, result


def measured(
    model: nn.Module,
    task: Task,
    recorder: Recorder | None,
    distribution: Distribution = Distribution.RADEMACHER,
    rows: Sequence[int] = (4, 4, 4, 4),
) -> list[float]:
    """The losses of a few measurements, one after the other, at seeds of their own."""
    estimator = Estimator(
        model, manifest_of(model), task, distribution=distribution, rounding=Rounding.STOCHASTIC,
        threads=1, recorder=recorder,
    )  # fmt: skip
    losses: list[float] = []
    for seed, (local, count) in enumerate(zip(LOCAL_PAIRS, rows, strict=True)):
        batch = batch_of(task, count)
        order = [(seed + k) % count for k in range(count)]
        batch = task.collate([batch.examples[k] for k in order], batch.name)
        losses += losses_of(estimator.measure(batch, local, [99 + seed], EPS))
    return losses


@pytest.mark.parametrize("kind", ["classification", "instruction"])
@pytest.mark.parametrize(
    ("architecture", "distribution"),
    [
        ("llama", Distribution.RADEMACHER),
        ("gpt2", Distribution.RADEMACHER),
        ("qwen2", Distribution.LOW_RANK_1),
        ("mixtral", Distribution.RADEMACHER),
    ],
)
def test_losses_are_those_of_plain_launches(
    architecture: str,
    distribution: Distribution,
    kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Padding changes nothing; the pass is recorded once, and replayed at other seeds and rows."""
    model, task, recorder = model_of(architecture), task_of(tokenizer, kind), Replays()
    expected = measured(model, task, None, distribution)
    with on_a_device():
        assert measured(model, task, recorder, distribution) == pytest.approx(expected, rel=3e-6)
    # The first measurement has no local pairs, so its low-rank launches are others.
    assert (recorder.records, recorder.replays) == ((1, 2) if not distribution.rank else (1, 1))
    assert not [record for record in caplog.records if "not recorded" in record.message]


@pytest.mark.parametrize(
    "recorder", [Replays(stale=True), Replays(fails=True)], ids=["stale", "fails"]
)
def test_what_cannot_be_recorded_is_launched_plainly(
    recorder: Replays,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same bits as by recordings, and one warning."""
    model, task = model_of("llama"), task_of(tokenizer)
    with on_a_device():
        expected = measured(model, task, Replays())
        assert measured(model, task, recorder) == expected
    [warning] = [record for record in caplog.records if "not recorded" in record.message]
    assert ("no room" if recorder._fails else "other losses") in warning.message
    assert recorder.records == 1


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "always"])
def test_recordings_are_dropped_where_memory_runs_out(
    lasts: bool,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a pass that is launched plainly; it is repeated once without them."""
    model, task, recorder = model_of("llama"), task_of(tokenizer), Replays()
    with on_a_device():
        expected = measured(model, task, recorder, rows=(4, 4, 4, 3))
        row_losses, calls = task.row_losses, itertools.count()

        def runs_out(*args: Any) -> torch.Tensor:
            if len(args[1].labels) == 6 and (next(calls) == 0 or lasts):  # two copies of 3 rows
                raise torch.OutOfMemoryError("no room for the last batch")
            return row_losses(*args)

        monkeypatch.setattr(task, "row_losses", runs_out)
        if lasts:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                measured(model, task, recorder, rows=(4, 4, 4, 3))
        else:
            assert measured(model, task, recorder, rows=(4, 4, 4, 3)) == expected
    [warning] = [record for record in caplog.records if "not recorded" in record.message]
    assert "memory ran out" in warning.message


def test_few_recordings_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    """Those of the shapes that came last."""
    recorder = Replays()
    graphs, batch = Graphs(recorder), batch_of(task_of(tokenizer), 1)

    def work(rows: object) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.float64)

    for _ in range(3):
        for tokens in range(100, 117):
            graphs.run(None, batch.padded(tokens, 0), work)
    assert recorder.records == 0, "one shape more than are kept, in turns"
    for _ in range(2):
        graphs.run(None, batch.padded(116, 0), work)
    assert (recorder.records, recorder.replays) == (1, 1)
    assert graphs.active
    graphs.run("another model", replace(batch, name="other"), work)
    assert recorder.records == 1


class Driver:
    """Torch's part of recording CUDA graphs: which memory is given up when, as torch has it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.users: dict[int, int] = {}
        """Graphs that use a pool."""
        self.recording: list[int] = []
        """Pools that are recorded into, as torch's allocator believes."""
        self.stream = "plain"
        self.waits = False
        """Whether what is recorded waits for the device, which ends a recording."""
        driver, handles = self, itertools.count(1)

        class Graph:
            pool = 0

            def replay(self) -> None:
                pass

            def __del__(self) -> None:
                driver.release(0, self.pool)

        @contextmanager
        def graph(own: Graph, pool: int, stream: str, capture_error_mode: str) -> Iterator[None]:
            assert self.users.setdefault(pool, 1) > 0, "a pool that was given up"
            self.users[pool] += pool in [graph.pool for graph in self.alive]
            self.recording.append(pool)
            self.stream = stream
            yield
            if self.waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recording.remove(pool)
            self.stream, own.pool = "plain", pool
            self.alive.add(own)

        self.alive: weakref.WeakSet[Graph] = weakref.WeakSet()
        streams = {
            "current_stream": lambda: SimpleNamespace(device_index=0),
            "set_stream": lambda stream: setattr(self, "stream", "plain"),
            "Stream": lambda: "ours",
        }
        for name, value in streams.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def end(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool: int) -> None:
        if pool:
            self.users[pool] -= 1


def test_recordings_share_memory_until_all_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up the memory with its last graph, and refuses to record into it again."""
    driver, graphs = Driver(monkeypatch), CudaGraphs()
    first, second = graphs.record(lambda: torch.zeros(1)), graphs.record(lambda: torch.zeros(1))
    assert driver.users == {1: 2}
    del first
    third = graphs.record(lambda: torch.zeros(1))
    assert driver.users == {1: 2}
    del second, third
    last = graphs.record(lambda: torch.zeros(1))
    assert driver.users == {1: 0, 2: 1}
    del last


def test_a_recording_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the stream nor torch's allocator, which could free nothing while it records."""
    driver, graphs = Driver(monkeypatch), CudaGraphs()

    def work() -> torch.Tensor:
        driver.waits = True
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(work)
    assert (driver.stream, driver.recording, driver.users) == ("plain", [], {1: 0})
    driver.waits = False
    kept = graphs.record(lambda: torch.zeros(1))
    assert driver.users == {1: 0, 2: 1}
    del kept


def test_shapes_are_few(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also those of responses, whose logits need a position before each."""
    task, shapes = task_of(tokenizer, "instruction"), set()
    for prompt in range(1, 20):
        for response in range(1, 20):
            example = EncodedExample((1,) * prompt, (2,) * response, -1)
            batch = padded(task.collate([example], "a test"))
            assert batch.input_ids.shape[1] > batch.targets.shape[1] > response
            assert batch.targets[0, -response:].tolist() == [2] * response
            assert (batch.targets[0, :-response] == -100).all()
            shapes.add((batch.input_ids.shape, batch.targets.shape))
    assert len(shapes) <= 12
    assert padded(batch_of(task_of(tokenizer), 1)).targets.shape[1] == 0, "classification"


def test_lengths_are_few_and_little_larger() -> None:
    lengths = [padded_length(tokens) for tokens in range(1, 2049)]
    assert all(
        0 < length - tokens <= max(8, tokens / 8) for tokens, length in enumerate(lengths, 1)
    )
    assert len(set(lengths)) < 50
