"""One measurement, compared with forward passes of the same model on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.roofline import Roofline
from benchmarks.engine.subjects import Subject
from benchmarks.figures import Figure
from benchmarks.machine import Machine
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.noise import Distribution

EPS = 1e-3
PROBES = 8


def forward(subject: Subject, batch: Batch) -> Callable[[], float]:
    """The model's own forward with its own loss: transformers' plain way."""
    model: Any = subject.model
    ids = batch.input_ids

    @torch.inference_mode()
    def call() -> float:
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    return call


def figures(
    machine: Machine,
    subject: Subject,
    tokens: int,
    *,
    turns: int,
    goal: str = "",
    roofline: Roofline | None = None,
) -> Iterator[Figure]:
    """A two-sided measurement, its floor, and MeZO in place, each over one forward."""
    batch = subject.batch(tokens)
    doubled = batch.repeated(2)
    estimator = subject.estimator(Distribution.RADEMACHER)
    estimator.measure(batch, [], [1], EPS)  # the first one makes more passes, to see what it may
    one = forward(subject, batch)
    seconds = machine.best(
        {
            "forward": one,
            "doubled": lambda: subject.task.losses(subject.model, doubled, 2),
            "measurement": lambda: estimator.measure(batch, [], [1], EPS),
        },
        turns,
    )
    name = f"{tokens:,} tokens"
    unit = machine.time_unit
    yield Figure(f"one forward with its loss, {name}{machine.suffix}", seconds["forward"], unit)
    yield Figure(f"measurement, rademacher, {name}{machine.suffix}", seconds["measurement"], unit)
    yield Figure(
        f"measurement ÷ forward, {name}{machine.suffix}",
        seconds["measurement"] / seconds["forward"],
        "ratio",
        goal,
    )
    yield Figure(
        f"floor: forward of the doubled batch ÷ forward, {name}{machine.suffix}",
        seconds["doubled"] / seconds["forward"],
        "ratio",
    )
    if roofline is not None:
        parameters = list(subject.model.parameters())
        products = 2 * tokens * sum(parameter.numel() for parameter in parameters)
        bound = roofline.passes_seconds(sum(p.nbytes for p in parameters), products)
        share = 100 * bound / seconds["measurement"]
        yield Figure(f"measurement, {name}, as a share of the roofline", share, "%")
    for distribution in (Distribution.RADEMACHER, Distribution.GAUSSIAN):
        plain = PlainTorch(trained_tensors(subject.model, subject.manifest), distribution)
        in_place = machine.best(
            {"measurement": lambda plain=plain: plain.measure(one, 1, EPS)},  # type: ignore[misc]
            3 if tokens < 1000 else 1,
        )
        yield Figure(
            f"torch, MeZO in place, {distribution.value}: "
            f"measurement ÷ forward, {name}{machine.suffix}",
            in_place["measurement"] / seconds["forward"],
            "ratio",
        )


def low_rank(machine: Machine, subject: Subject, tokens: int, *, turns: int) -> Iterator[Figure]:
    """Eight one-sided probes of rank 1 in one pass, over a plain forward of as many copies."""
    batch = subject.batch(tokens)
    copies = batch.repeated(PROBES + 1)
    estimator = subject.estimator(Distribution.LOW_RANK_1, one_sided=True)
    seeds = list(range(1, PROBES + 1))
    estimator.measure(batch, [], seeds, EPS)
    seconds = machine.best(
        {
            "copies": lambda: subject.task.losses(subject.model, copies, PROBES + 1),
            "measurement": lambda: estimator.measure(batch, [], seeds, EPS),
        },
        turns,
    )
    yield Figure(
        f"measurement, low-rank-1, {PROBES} one-sided probes ÷ "
        f"forward of the {PROBES + 1}-fold batch, {tokens:,} tokens{machine.suffix}",
        seconds["measurement"] / seconds["copies"],
        "ratio",
        "at most 1.15",
    )
