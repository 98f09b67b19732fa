"""How near `fedmezo probe` comes to a grid search, and what both cost, on three real tasks.

    python -m benchmarks.use.probing [demo|classes|instruction] ...

The demo's two classes of texts, five classes of texts with plain steps, and
instruction tuning. The runs are short and train a small adapter at the end of SmolLM2-135M, so that
a grid search takes minutes. All is done in one process (`experiments.in_memory_federation`).
"""

from __future__ import annotations

import json
import math
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.figures import REPORTS, Figure, show, write
from deploy.demo import prepare
from experiments.in_memory_federation import LOST, InMemoryFederation
from experiments.instruction_data import ALPACA
from experiments.public_data import fetched
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.layered_settings import ROW_STATES_MAX
from fedmezo_core.zo.assignment import open_row_states
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.fitting import fit_adapter
from fedmezo_core.zo.forward.row_states import SpooledRows
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.party import Party, open_party
from fedmezo_core.zo.probing.proposal import Proposal, forwards_of
from fedmezo_core.zo.probing.readings import probe_party
from fedmezo_core.zo.weights import Weights

CACHE: Final = Path("build/cache")
CHARACTERS_MAX: Final = 70
"""Longest text of a row; longer rows would only take longer."""
CLASSES: Final = {
    "very negative": " terrible",
    "negative": " bad",
    "neutral": " okay",
    "positive": " good",
    "very positive": " great",
}
CLASS_BOUNDS: Final = (-2.0, -0.7, 0.7, 2.0)
"""Mean ratings between two of the five classes."""
_ADAPTER: Final = {
    "rank": 8,
    "alpha": 8.0,
    "target_modules": ["layers.29.mlp.down_proj"],
    "freeze_a": True,
}
"""4,608 trained parameters behind nearly all of the model, as in the experiments."""
ALLOWED_POINTS: Final = 1.0
ALLOWED_LOSS_PERCENT: Final = 2.0


@dataclass(frozen=True)
class Job:
    """A task: its contract, each worker's rows, and the rates of the grid."""

    title: str
    changes: Mapping[str, Any]
    workers: Mapping[str, Sequence[Example]]
    heldout: Sequence[Example]
    texts: Sequence[Example]
    rates: tuple[float, ...]

    def config(self, **changes: Any) -> RunConfig:
        """The contract, with `changes`."""
        count = len(self.workers)
        values = {
            "run_id": "probed",
            "model": "smollm2-135m",
            "local_steps": 1,
            "learning_rate": 1e-6,
            "estimator": "one_sided",
            "schedule": "linear",
            "distribution": "low_rank_1",
            "digest_every_rounds": 1_000_000,
            "pause_rounds": 0,
            "workers_min": count,
            "quorum": count,
        }
        return parse_run({**values, **self.changes, **changes}, "the benchmark's run")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended on the held-out rows; NaN if it diverged."""

    rate: float
    loss: float
    accuracy: float


# ---------------------------------------------------------------- tasks


def demo_job(*, small: bool) -> Job:
    """The demo's texts, classes, probes and steps, in fewer rounds."""
    columns, folder = ("text", "label"), CACHE / prepare.DATA_FOLDER
    files = sorted(folder.glob("*.train.jsonl"))
    rows = {file.name.split(".")[0]: _short(read_examples(file, columns)) for file in files}
    return Job(
        "the demo's task",
        {
            "rounds": 12 if small else 20,
            "probes": 28,
            "batch_size": 16,
            "normalized_step": True,
            "lora": _ADAPTER,
            "task": {
                "template": "{text} It was",
                "tokens_max": 64,
                "verbalizers": {"negative": " terrible", "positive": " great"},
            },
        },
        {name: own[:32] for name, own in rows.items()},
        _short(read_examples(folder / "heldout.jsonl", columns)),
        [row for own in rows.values() for row in own[-25:]],
        (1.0, 4.0) if small else (0.5, 1.0, 2.0, 4.0, 8.0),
    )


def classes_job() -> Job:
    """Five classes by VADER's ratings, balanced, with plain steps on few parameters."""
    rows: dict[str, list[Example]] = {name: [] for name in CLASSES}
    for number, snippet in enumerate(_snippets(), start=1):
        label = list(CLASSES)[sum(snippet.rating > bound for bound in CLASS_BOUNDS)]
        rows[label].append(Example({"text": snippet.text, "label": label}, "VADER", number))
    ordered = [
        row for group in zip(*(_short(own) for own in rows.values()), strict=False) for row in group
    ]
    return Job(
        "five classes of texts",
        {
            "rounds": 40,
            "probes": 16,
            "batch_size": 12,
            "normalized_step": False,
            "lora": _ADAPTER,
            "task": {"template": "{text} It was", "tokens_max": 64, "verbalizers": CLASSES},
        },
        {name: ordered[120 + 50 * k : 170 + 50 * k] for k, name in enumerate("abc")},
        ordered[:120],
        ordered[300:400],
        (16.0, 32.0, 64.0, 128.0, 256.0),
    )


def instruction_job() -> Job:
    """Instructions with short answers."""
    with tarfile.open(fetched(ALPACA, CACHE)) as archive:
        member = archive.extractfile("llamafactory-0.9.4/data/alpaca_en_demo.json")
        assert member is not None
        found = json.load(member)
    columns = ("instruction", "input", "output")
    rows = [
        Example({name: str(item[name]) for name in columns}, "alpaca_en_demo.json", number)
        for number, item in enumerate(found, start=1)
        if len(item["instruction"]) + len(item["input"]) <= 90 and 4 <= len(item["output"]) <= 45
    ]
    return Job(
        "instruction tuning",
        {
            "rounds": 50,
            "probes": 8,
            "batch_size": 2,
            "normalized_step": True,
            "lora": _ADAPTER,
            "task": {
                "kind": "instruction",
                "template": "{instruction}\n{input}\nAnswer:",
                "response_column": "output",
                "tokens_max": 64,
            },
        },
        {"a": rows[30:55], "b": rows[55:80]},
        rows[:30],
        rows[30:],
        (0.3, 1.0, 3.0, 9.0),
    )


def _short(rows: Sequence[Example]) -> list[Example]:
    return [row for row in rows if len(row.values["text"]) <= CHARACTERS_MAX]


def _snippets() -> list[prepare.Snippet]:
    """VADER's sentences, each once, in the order of a hash."""
    archive = CACHE / "archives" / prepare.ARCHIVES["vaderSentiment"].format(version="3.3.2")
    once = {prepare.text_key(each.text): each for each in prepare.read_snippets(archive)}
    return [once[key] for key in sorted(once, key=prepare.order_of) if key]


# ---------------------------------------------------------------- runs


class Trial:
    """One loaded base on which a task is probed and run again and again."""

    def __init__(self, job: Job) -> None:
        """Load the base and fit its adapter to the task's texts."""
        self.job = job
        self.party = open_party(job.config(), str(CACHE / prepare.MODEL_FOLDER), threads=1)
        fit_adapter(self.party, job.texts)
        model, manifest = self.party.loaded.model, self.party.loaded.manifest
        self._tensors = trained_tensors(model, manifest)
        self._base = [tensor.clone() for tensor in self._tensors]
        self._states = open_row_states(
            self.party, SpooledRows(2 * ROW_STATES_MAX), visits=math.inf, batch_size=16
        )
        self._heldout = self.party.task.encode(job.heldout)

    def probe(self) -> tuple[Proposal, int]:
        """The proposal, and the forward passes that it took."""
        groups = zip(*self.job.workers.values(), strict=False)
        rows = [row for group in groups for row in group]
        return probe_party(
            self._at_base(),
            rows,
            len(self.job.workers),
            threads=1,
            row_states_max=2 * ROW_STATES_MAX,
        )

    def run(self, rate: float) -> Outcome:
        """A run at one rate."""
        party = self._at_base(learning_rate=rate)
        federation = InMemoryFederation(party, self.job.workers, row_states=self._states)
        try:
            federation.run()
            found = evaluate(
                party.task,
                party.loaded.model,
                self._heldout,
                party.config.batch_size,
                around_batch=None if self._states is None else self._states.known,
            )
        except LOST:
            return Outcome(rate, math.nan, 0.0)
        outcome = Outcome(rate, found.loss, found.accuracy)
        print(f"{self.job.title}: {outcome}", file=sys.stderr, flush=True)
        return outcome

    def _at_base(self, **changes: Any) -> Party:
        for tensor, base in zip(self._tensors, self._base, strict=True):
            tensor.copy_(base)
        party = self.party
        weights = Weights(
            party.loaded.model,
            party.loaded.manifest,
            distribution=party.distribution,
            rounding=party.rounding,
            threads=1,
        )
        return replace(party, config=self.job.config(**changes), weights=weights)


def figures_of(job: Job) -> Iterator[Figure]:
    """Probe, search the grid, and compare."""
    begin = time.process_time()
    trial = Trial(job)
    found, passes = trial.probe()
    probed = time.process_time()
    config = job.config()
    rate = found.values(normalized=config.normalized_step)["learning_rate"]
    print(f"{job.title}: {found}", file=sys.stderr, flush=True)
    ours = trial.run(rate)
    ran = time.process_time()
    grid = [trial.run(each) for each in job.rates]
    finite = [each for each in grid if math.isfinite(each.loss)]
    best = min(finite, key=lambda each: each.loss)
    over = 100 * (ours.loss / best.loss - 1)
    behind = 100 * (best.accuracy - ours.accuracy)
    share = 100 * passes / forwards_of(config, len(job.workers))
    name = job.title
    yield Figure(f"{name}: rate that the probe proposes", rate, "")
    yield Figure(f"{name}: rate of the grid with the lowest loss", best.rate, "")
    yield Figure(f"{name}: loss at the proposed rate, above the grid's lowest", over, "%")
    yield Figure(f"{name}: accuracy there, below that at the grid's lowest loss", behind, "points")
    yield Figure(
        f"{name}: distance from it, as a part of the allowed 1 point or 2 % of the loss",
        max(0.0, min(over / ALLOWED_LOSS_PERCENT, behind / ALLOWED_POINTS)),
        "x",
        "at most 1",
    )
    yield Figure(f"{name}: forward passes of the probe", share, "% of the run", "at most 5")
    yield Figure(f"{name}: CPU time of the probe and its loading", probed - begin, "s")
    yield Figure(f"{name}: CPU time of a run", ran - probed, "s")


def figures(small: bool) -> Iterator[Figure]:
    """All figures of this benchmark; `small`: of one short run and two rates."""
    torch.set_num_threads(1)
    prepare.prepare(CACHE)
    yield from figures_of(demo_job(small=small))
    if not small:
        yield from figures_of(classes_job())
        yield from figures_of(instruction_job())


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare.prepare(CACHE)
    jobs = {
        "demo": lambda: demo_job(small=False),
        "classes": classes_job,
        "instruction": instruction_job,
    }
    measured = [each for name in sys.argv[1:] or jobs for each in figures_of(jobs[name]())]
    write(measured, REPORTS / "probing.json")
    show(measured, "What fedmezo probe proposes, beside a grid search")
