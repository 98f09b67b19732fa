"""The experiments: which arms are compared, in what they differ, and how it is shown. One line an arm.

Values that arms share are in `settings`. An arm's `run` holds values of `RunConfig`, its `settings`
those of `Settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from experiments.first_order import FirstOrder
from experiments.runs import Run
from experiments.settings import FULL_RATE, LORA, LORA_RATE, RUN, Settings, config_of

Metric = Literal["accuracy", "calibrated_accuracy", "auc", "loss"]
Axis = Literal["round", "forwards", "bytes"]
Panel = tuple[Metric, Axis]

BY_ROUND: Final[tuple[Panel, ...]] = (
    ("accuracy", "round"),
    ("calibrated_accuracy", "round"),
    ("auc", "round"),
    ("loss", "round"),
)
BY_FORWARDS: Final[tuple[Panel, ...]] = (
    ("accuracy", "round"),
    ("loss", "round"),
    ("accuracy", "forwards"),
    ("loss", "forwards"),
)
BY_BYTES: Final[tuple[Panel, ...]] = (
    ("accuracy", "round"),
    ("calibrated_accuracy", "round"),
    ("loss", "round"),
    ("accuracy", "bytes"),
)


@dataclass(frozen=True)
class Arm:
    """One curve."""

    name: str
    run: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    first_order: FirstOrder | None = None
    rate_factor: float = 1.0
    """What the learning rate of all arms is multiplied by."""


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared over the same seeds."""

    title: str
    arms: tuple[Arm, ...]
    panels: tuple[Panel, ...] = BY_ROUND
    seeds: int = 2
    run: Mapping[str, Any] = field(default_factory=dict)
    """What all arms have beside `settings.RUN`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, str] = field(default_factory=dict)
    """Arm -> the arm that it is held against; the report then has the peak memory of both methods
    beside that of inference, too."""
    goals: Mapping[str, str] = field(default_factory=dict)
    """Name of a figure -> its goal."""


PERSONAL: Final[dict[str, dict[str, Any]]] = {
    "frozen": {},
    "last loss": {"personal_rate": "last_loss", "report_losses": True},
    "mean loss": {"personal_rate": "mean_loss", "report_losses": True},
    "update distance": {"personal_rate": "update_distance"},
    "random": {"personal_rate": "random"},
}
"""What a worker's own learning rate follows -> values of `RunConfig`."""


def at_equal_forwards(estimator: str, probes: int, *, normalized_step: bool = False) -> Arm:
    """As many forward passes a round as two-sided MeZO has; more probes allow a larger rate.

    The variance of a step falls with the number of directions that it averages, and the largest rate
    that is stable grows with it (Malladi et al. 2023, section 4).
    """
    passes = 2 * probes if estimator == "two_sided" else probes + 1
    steps = max(1, 2 * RUN["local_steps"] // passes)
    name = f"{estimator.replace('_', '-')}, {probes} probe{'s' if probes > 1 else ''}"
    values: dict[str, Any] = {"estimator": estimator, "probes": probes, "local_steps": steps}
    if normalized_step:
        name += ", normalised"
        values["normalized_step"] = True
    return Arm(f"{name}, {steps} steps", values, rate_factor=float(probes))


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "accuracy": Experiment(
        "FedMeZO against federated averaging with back-propagation",
        (
            Arm("FedMeZO, full"),
            Arm("FedMeZO, LoRA", {"lora": LORA, "eps": 1e-2}, rate_factor=50.0),
            Arm("BP-FedAvg, full", first_order=FirstOrder(learning_rate=FULL_RATE)),
            Arm("BP-FedAvg, LoRA", {"lora": LORA}, first_order=FirstOrder(learning_rate=LORA_RATE)),
        ),
        panels=BY_BYTES,
        seeds=3,
        against={
            "FedMeZO, full": "BP-FedAvg, full",
            "FedMeZO, LoRA": "BP-FedAvg, LoRA",
        },
    ),
    "personalised": Experiment(
        "Personalised learning rates",
        tuple(Arm(name, values) for name, values in PERSONAL.items()),
        seeds=3,
    ),
    "local-steps": Experiment(
        "Local steps between two commits",
        tuple(Arm(f"H = {steps}", {"local_steps": steps}) for steps in (10, 30, 50)),
        panels=BY_FORWARDS,
    ),
    "clients": Experiment(
        "Number of clients",
        tuple(Arm(f"{count} clients", settings={"clients": count}) for count in (3, 5, 9, 20, 40)),
        panels=BY_FORWARDS,
    ),
    "distributions": Experiment(
        "Distribution of directions",
        tuple(Arm(name, {"distribution": name}) for name in ("rademacher", "gaussian")),
    ),
    "precision": Experiment(
        "Precision of the weights",
        (
            Arm("float32"),
            Arm("bfloat16, stochastic", {"dtype": "bfloat16", "rounding": "stochastic"}),
            Arm("bfloat16, nearest", {"dtype": "bfloat16", "rounding": "nearest"}),
        ),
    ),
    "estimators": Experiment(
        "Estimators at equal forward passes",
        (
            at_equal_forwards("two_sided", 1),
            at_equal_forwards("two_sided", 5),
            at_equal_forwards("one_sided", 1),
            at_equal_forwards("one_sided", 4),
            at_equal_forwards("one_sided", 9),
            at_equal_forwards("one_sided", 9, normalized_step=True),
        ),
    ),
}


@dataclass(frozen=True)
class Changes:
    """What the command line asks for on top of all arms."""

    run: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    """Sizes that say nothing, to see that it runs."""


def run_of(experiment: Experiment, arm: Arm, seed: int, changes: Changes) -> Run:
    """The run of one arm with one seed; raises `ConfigError` for values that are not allowed."""
    run: dict[str, Any] = {**RUN, **experiment.run, **changes.run}
    run["learning_rate"] *= arm.rate_factor
    run |= arm.run
    settings = {**experiment.settings, **changes.settings, **arm.settings}
    if changes.quick:
        run |= {"rounds": 2, "local_steps": max(1, run["local_steps"] // 10), "batch_size": 2}
        settings |= {"heldout_per_label": 1, "heldout_rows_max": 16, "curve_rows": 8}
    made = Settings.model_validate(settings)
    return Run(settings=made, config=config_of(made, seed, run), first_order=arm.first_order)
