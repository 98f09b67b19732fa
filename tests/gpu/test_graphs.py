"""CUDA graphs of whole passes on a real GPU: the losses of plain launches, bit for bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pytest
import torch

from benchmarks.engine.subjects import LLAMA_TINY, Subject, llama
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.graphs import CudaGraphs
from fedmezo_core.zo.noise import Distribution
from fedmezo_core.zo.plain.measurements import Measurement

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a CUDA device and compiled kernels; run make test-gpu where there is one",
)


class Refuses:
    """Records nothing, so that passes are plain launches on the same padded batches."""

    def record(self, work: Callable[[], torch.Tensor]) -> NoReturn:
        raise RuntimeError("nothing is recorded")


def _measured(subject: Subject, estimator: Estimator) -> list[Measurement]:
    """Several measurements of one shape at other seeds, local pairs and tokens."""
    found = []
    for number in range(6):
        batch = subject.batch(20 + number % 3)
        local = [(90 + number, 0.01)]
        found += estimator.measure(batch, local, [10 * number + 1, 10 * number + 2], 1e-2)
    return found


@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_passes(
    dtype: torch.dtype, distribution: Distribution, caplog: pytest.LogCaptureFixture
) -> None:
    subject = llama(LLAMA_TINY, torch.device("cuda", 0), dtype)
    recorded = subject.estimator(distribution, one_sided=True)
    plain = subject.estimator(distribution, one_sided=True, recorder=Refuses())
    assert recorded._graphs is not None
    assert isinstance(recorded._graphs._recorder, CudaGraphs)
    with caplog.at_level(logging.WARNING):
        measured = _measured(subject, recorded)
    assert recorded._graphs.active, caplog.text
    assert measured == _measured(subject, plain)
    assert any(recording.trusted for recording in recorded._graphs._recordings.values())


def test_recorded_passes_see_commits() -> None:
    """Which write into the weights that the recording reads."""
    subject = llama(LLAMA_TINY, torch.device("cuda", 0), torch.bfloat16)
    recorded = subject.estimator(Distribution.RADEMACHER)
    before = _measured(subject, recorded)
    commit = Commit(np.array([3], np.uint64), np.array([0.05], np.float32), 4)
    subject.weights(Distribution.RADEMACHER).apply(1, [commit])
    plain = subject.estimator(Distribution.RADEMACHER, recorder=Refuses())
    after = _measured(subject, recorded)
    assert after == _measured(subject, plain)
    assert after != before


def test_recordings_that_fail_or_are_gone() -> None:
    """Torch's allocator goes on as before, and another recording is possible."""
    recorder, x = CudaGraphs(), torch.ones(1000, device="cuda")

    def twice() -> torch.Tensor:
        return 2 * x

    for waits in (False, True):
        kept = recorder.record(twice)
        if waits:
            with pytest.raises(RuntimeError):
                recorder.record(lambda: x * float(x.sum()))
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
            torch.cuda.empty_cache()
        replay, result = kept
        replay()
        assert torch.equal(result, twice())
        del kept, replay, result
    replay, result = recorder.record(twice)
    replay()
    assert torch.equal(result, twice())
