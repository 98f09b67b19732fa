"""Peak memory of each way to train and of inference, on the same batch of the same model.

Each way runs in its own process, which loads the run's model, forgets the peak of loading, makes a
few passes and prints its largest resident size.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.engine.measuring_memory import forget_peak, peak_kib
from benchmarks.figures import Figure
from experiments.first_order import FirstOrder, train
from experiments.judging import write_whole
from experiments.runs import KEPT, Run, key_of
from experiments.starting_point import load_data
from fedmezo_core.layered_settings import ROW_STATES_MAX
from fedmezo_core.zo.assignment import open_estimator, open_row_states
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.forward.row_states import SpooledRows
from fedmezo_core.zo.model.allocator import keep_freed_memory
from fedmezo_core.zo.party import Party, open_party

PASSES = 2
INFERENCE = "inference"
TRAINING = "training"
OF_INFERENCE = "peak memory of inference"


def passes(run: Run, party: Party, rows: Sequence[Example], way: str) -> Callable[[], object]:
    """Return a function that makes one pass, on the longest batch that the rows can make."""
    batch = longest_batch(run, party, rows)
    if way == INFERENCE:
        return lambda: party.task.loss(party.loaded.model, batch)
    first_order = run.first_order
    if isinstance(first_order, FirstOrder):
        return lambda: train(party, first_order, [batch])
    estimator = open_estimator(
        party,
        threads=run.settings.threads,
        pass_tokens_max=run.settings.pass_tokens_max,
        row_states=open_row_states(
            party,
            SpooledRows(ROW_STATES_MAX),
            visits=math.inf,
            batch_size=run.config.batch_size,
        ),
    )
    seeds = list(range(1, run.config.probes + 1))
    # With the pair of an earlier local step, as in most measurements.
    return lambda: estimator.measure(batch, [(0, 1e-9)], seeds, run.config.eps)


def longest_batch(run: Run, party: Party, rows: Sequence[Example]) -> Batch:
    """Make the batch that takes the most memory."""
    encoded = party.task.encode(rows).examples
    examples = sorted(encoded, key=lambda example: example.token_count)
    return party.task.collate(examples[-run.config.batch_size :], "the longest rows")


def peak_mb(run: Run, way: str) -> float:
    """Measure the largest resident size of a fresh process, in MB."""
    finished = subprocess.run(
        [sys.executable, "-m", "experiments.peak_memory", way],
        input=run.model_dump_json(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(finished.stdout.split()[-1]) / 1024


def kept_peak_mb(run: Run, way: str, folder: Path, *, fresh: bool = False) -> float:
    """Return `peak_mb`, or the value kept from before if nothing has changed since."""
    path = folder / f"memory-{way}-{key_of(run)}.json"
    if fresh or not path.exists():
        write_whole(path, f"{peak_mb(run, way)}")
    return float(path.read_text())


def figures(runs: dict[str, Run], folder: Path = KEPT, *, fresh: bool = False) -> list[Figure]:
    """Peak memory of a worker of each arm, and of inference on batches of the same size.

    All runs share model and data.
    """
    found: list[Figure] = []
    inferences: dict[int, float] = {}
    for name, run in runs.items():
        rows = run.config.batch_size
        if rows not in inferences:
            plain = run.model_copy(update={"first_order": None})
            inferences[rows] = kept_peak_mb(plain, INFERENCE, folder, fresh=fresh)
            of = f"{OF_INFERENCE}, batches of {rows}"
            found.append(Figure(of, inferences[rows], "MB"))
        inference = inferences[rows]
        peak = kept_peak_mb(run, TRAINING, folder, fresh=fresh)
        found.append(Figure(f"{name}: peak memory of a worker", peak, "MB"))
        found.append(
            Figure(f"{name}: peak memory of a worker ÷ inference", peak / inference, "ratio")
        )
    return found


def main() -> None:
    """The measured process: makes the passes and prints its peak in KiB."""
    run = Run.model_validate_json(sys.stdin.read())
    keep_freed_memory()
    party = open_party(run.config, run.settings.model, threads=run.settings.threads)
    rows = next(iter(load_data(run.settings, run.config.task).clients.values()))
    call = passes(run, party, rows, sys.argv[1])
    forget_peak()
    for _ in range(PASSES):
        call()
    print(peak_kib())


if __name__ == "__main__":
    main()
