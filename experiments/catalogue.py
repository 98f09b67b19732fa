"""The experiments: which arms are compared, how they differ, and what is plotted.

Values that all arms share are in `starting_point`. An arm's `run` holds values of `RunConfig`, its
`settings` those of `Settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from experiments import instructions
from experiments.first_order import FirstOrder
from experiments.runs import Run
from experiments.starting_point import (
    CACHE,
    DEEP_CORE_LORA,
    DEEP_LORA,
    FIRST_ORDER_LORA,
    FULL_RATE,
    LAST_LORA,
    LORA,
    LORA_RATE,
    RUN,
    Settings,
    config_of,
)
from experiments.topics_and_questions import TOPICS
from fedmezo_core.config import (
    CLIP_DROP_FACTOR,
    CLIP_MEDIAN_FACTOR,
    CLIP_SPREAD,
    RATE_DIRECTIONS,
)

Metric = Literal["accuracy", "calibrated_accuracy", "auc", "loss", "exact_match", "token_f1"]
Axis = Literal["round", "forwards", "rows", "bytes"]
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
BY_ROWS: Final[tuple[Panel, ...]] = (
    ("accuracy", "rows"),
    ("calibrated_accuracy", "rows"),
    ("auc", "rows"),
    ("loss", "rows"),
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


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared over the same seeds."""

    title: str
    arms: tuple[Arm, ...]
    panels: tuple[Panel, ...] = BY_ROUND
    seeds: int = 2
    run: Mapping[str, Any] = field(default_factory=dict)
    """Values of `RunConfig` that all arms have on top of `starting_point.RUN`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    drops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm -> baselines. The report says what share of their drop in held-out loss the arm has."""
    against: Mapping[str, str] = field(default_factory=dict)
    """Arm -> its baseline."""
    is_for_gpu: bool = False
    """Whether it takes days on a CPU."""
    has_memory: bool = False
    """Whether the report has the peak memory of training and inference, that of CPU processes."""
    paced_by: str = ""
    """The arm whose last losses, training and held-out, the others are timed to, in rounds; empty:
    none."""
    goals: Mapping[str, str] = field(default_factory=dict)
    """Name of a figure -> its goal."""


PERSONAL: Final[dict[str, dict[str, Any]]] = {
    "frozen": {},
    "last loss": {"personal_rate": "last_loss", "report_losses": True},
    "mean loss": {"personal_rate": "mean_loss", "report_losses": True},
    "update distance": {"personal_rate": "update_distance"},
    "random": {"personal_rate": "random"},
}
"""What a worker's personal learning rate follows -> values of `RunConfig`."""


CLASSIC: Final[dict[str, Any]] = {
    "estimator": "two_sided",
    "probes": 1,
    "normalized_step": False,
    "learning_rate": 6.0,
    "local_steps": 10,
    "rounds": 50,
}
"""Two-sided MeZO, one direction a batch, ten local steps a round: 1,000 forward passes a worker."""
FEW_ROWS: Final[dict[str, Any]] = {"rounds": 28, "probes": 6, "learning_rate": 4.0}
"""A fifth of `CLASSIC`'s rows, which are in 196 passes (decision 0036)."""
WHOLE: Final[dict[str, Any]] = {
    "lora": None,
    "dtype": "float32",
    "probes": 1,
    "local_steps": 10,
    "rounds": 4,
}
FIRST_ORDER: Final = (
    Arm(
        "BP-FedAvg, full",
        WHOLE,
        {"evaluate_every_rounds": 1},
        first_order=FirstOrder(learning_rate=FULL_RATE),
    ),
    Arm(
        "BP-FedAvg, LoRA",
        {**WHOLE, "lora": FIRST_ORDER_LORA},
        {"evaluate_every_rounds": 1},
        first_order=FirstOrder(learning_rate=LORA_RATE),
    ),
)


SMALL_LORA: Final[dict[str, Any]] = {**LORA, "rank": 2, "alpha": 2.0}
"""1,152 trained parameters, for runs with few directions."""
QUESTIONS: Final[dict[str, Any]] = {
    "kind": "instruction",
    "template": "{passage}\nQuestion: {question}\nAnswer:",
    "response_column": "answer",
    "tokens_max": 96,
}
"""The task of answering in words of a sentence."""


ON_A_CPU: Final[dict[str, Any]] = {
    "train_rows_max": 1000,
    "heldout_rows_max": None,
    "curve_rows": 300,
    "evaluate_every_rounds": 20,
}
"""Settings with which a run takes less than an hour of a core."""


def _accuracy(
    title: str,
    run: Mapping[str, Any],
    behind_max: float,
    goals: Mapping[str, str] | None = None,
    **others: Any,
) -> Experiment:
    """Compare FedMeZO, with the values of `run`, with back-propagation; `goals` come on top."""
    return Experiment(
        title,
        (Arm("FedMeZO", {"probes": 31, **run}), *FIRST_ORDER),
        panels=BY_BYTES,
        against={"FedMeZO": "BP-FedAvg, full"},
        goals={
            "FedMeZO: held-out accuracy, behind BP-FedAvg, full": f"at most {behind_max}",
            "BP-FedAvg, full ÷ FedMeZO: bytes up": "at least 1000",
            "BP-FedAvg, full ÷ FedMeZO: bytes down": "at least 1000",
            "FedMeZO: peak memory of a worker ÷ inference": "at most 1.1",
            **(goals or {}),
        },
        **others,
    )


def _instructions(title: str, data: str, splitters: tuple[str, ...]) -> Experiment:
    """FedMeZO beside back-propagation on instructions, IID and with `splitters`."""
    zo, same, layers = instructions.ZO, instructions.SAME, instructions.ALL_LAYERS
    zo_deep, same_deep = instructions.ZO_DEEP, instructions.SAME_DEEP
    arms = [
        Arm(zo),
        Arm(same, first_order=instructions.SAME_RATE),
        Arm(
            layers,
            instructions.ALL_LAYERS_RUN,
            {"evaluate_every_rounds": 6},
            instructions.ALL_LAYERS_RATE,
        ),
        Arm(zo_deep, instructions.DEEP_ZO_RUN_OF[data], instructions.DEEP_SETTINGS),
        Arm(
            same_deep,
            instructions.DEEP_RUN,
            instructions.DEEP_SETTINGS,
            instructions.SAME_RATE,
        ),
    ]
    few = instructions.ZO_FEW, instructions.SAME_FEW
    arms += [
        Arm(few[0], instructions.FEW_ZO_RUN, instructions.DEEP_SETTINGS),
        Arm(few[1], instructions.FEW_RUN, instructions.DEEP_SETTINGS, instructions.FEW_RATE),
    ]
    drops: dict[str, tuple[str, ...]] = {
        few[0]: (few[1], layers),
        zo: (same, layers),
        same: (layers,),
        zo_deep: (same_deep, layers),
        same_deep: (layers,),
    }
    for splitter in splitters:
        dealt = {"splitter": splitter}
        arms += [
            Arm(f"{zo}, {splitter}", {}, dealt),
            Arm(f"{same}, {splitter}", {}, dealt, instructions.SAME_RATE),
        ]
        drops[f"{zo}, {splitter}"] = (f"{same}, {splitter}",)
    return Experiment(
        title,
        tuple(arms),
        panels=(("loss", "round"), ("loss", "forwards")),
        run={**instructions.RUN, "task": instructions.TASKS[data]},
        settings={**instructions.SETTINGS, "data": str(CACHE / "data" / data)},
        drops=drops,
        goals={f"{zo}: share of the drop of {same}, at convergence": "at least 0.9"},
    )


def _instruction_federations() -> Experiment:
    """More clients, local steps and personal rates, on instructions and in the last layer."""
    zo, same = instructions.ZO, instructions.SAME
    differing: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        f"{clients} clients": ({}, {"clients": clients}) for clients in (3, 9, 20, 40)
    }
    differing["10 local steps"] = (instructions.LOCAL_STEPS, {"evaluate_every_rounds": 1})
    both = [f"{zo}, {name}" for name in differing]
    arms = [Arm(f"{zo}, {name}", *values) for name, values in differing.items()]
    arms += [
        Arm(f"{same}, {name}", *values, instructions.SAME_RATE)
        for name, values in differing.items()
    ]
    arms += [
        Arm(f"{zo}, personal rate: {name}", values)
        for name, values in PERSONAL.items()
        if name != "frozen"
    ]
    return Experiment(
        "Instruction tuning: more clients, local steps and personal rates",
        tuple(arms),
        panels=(("loss", "round"), ("loss", "forwards")),
        run={
            **instructions.RUN,
            "task": instructions.TASKS["hellaswag"],
            "rounds": 20,
            # As long as without the rule for the directions of three clients, and longer for more.
            "learning_rate": 1.3,
            "rate_directions": RATE_DIRECTIONS,
        },
        settings={
            **instructions.SETTINGS,
            "data": str(CACHE / "data/hellaswag"),
            "evaluate_every_rounds": 5,
        },
        drops={name: (name.replace(zo, same),) for name in both},
    )


DEFAULT_CLIP: Final[dict[str, Any]] = {
    "clip_median_factor": CLIP_MEDIAN_FACTOR,
    "clip_spread": CLIP_SPREAD,
    "clip_drop_factor": CLIP_DROP_FACTOR,
}
"""How new runs take answers."""
BYZANTINE: Final = (
    Arm("nobody attacks", DEFAULT_CLIP, {"attack": "none"}),
    Arm("mean", {"clip_median_factor": 0.0}),
    Arm("clip of ten times", {"clip_median_factor": 10.0}),
    Arm("default", DEFAULT_CLIP),
    *(
        Arm(
            name.replace("_", " "),
            {**DEFAULT_CLIP, "seed_policy": "shared", "aggregation": name},
        )
        for name in ("trimmed_mean", "median", "sign_vote")
    ),
)


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "accuracy": _accuracy(
        "FedMeZO against federated averaging with back-propagation",
        {"rounds": 120, "learning_rate": 0.4, "lora": LAST_LORA},
        0.03,
        {"FedMeZO: core-minutes, all workers": "at most 60"},
        has_memory=True,
        settings=ON_A_CPU,
    ),
    "privacy": Experiment(
        "FedMeZO with differential privacy on every worker",
        (
            Arm("no noise"),
            *(
                Arm(f"epsilon {epsilon:g}", settings={"privacy_epsilon": epsilon})
                for epsilon in (8.0, 2.0, 1.0)
            ),
        ),
        run={
            "rounds": 50,
            "probes": 28,
            "batch_size": 64,
            "learning_rate": 0.5,
            "rate_directions": 64,
            "report_losses": False,
            "lora": LAST_LORA,
        },
        settings=ON_A_CPU,
    ),
    "accuracy-deep": _accuracy(
        "FedMeZO in deep layers against federated averaging with back-propagation",
        {
            "rounds": 80,
            "probes": 63,
            "learning_rate": 0.45,
            "lora": DEEP_CORE_LORA,
            "distribution": "rademacher",
            # The frozen base alone is in bfloat16, which a CPU with AMX multiplies six times as
            # fast. Differences of losses must then be larger than its rounding.
            "dtype": "bfloat16",
            "eps": 0.05,
        },
        0.01,
        {"FedMeZO: core-minutes, all workers": "at most 60"},
        has_memory=True,
        seeds=1,
        settings={**ON_A_CPU, "evaluate_every_rounds": 10},
    ),
    "accuracy-gpu": _accuracy(
        "FedMeZO against back-propagation, with the steps that a GPU allows",
        {"rounds": 300, "learning_rate": 0.12, "lora": DEEP_LORA},
        0.01,
        seeds=3,
        is_for_gpu=True,
        settings={
            "train_rows_max": None,
            "heldout_rows_max": None,
            "curve_rows": None,
            "evaluate_every_rounds": 50,
            "device": "cuda",
            "pass_tokens_max": 16384,
        },
    ),
    "estimators": Experiment(
        "Estimators",
        (
            Arm("two-sided MeZO, 1000 forwards", CLASSIC),
            Arm(
                "two-sided MeZO, 200 forwards",
                {**CLASSIC, "rounds": 10, "learning_rate": 24.0},
            ),
            Arm("one-sided, 6 probes, 196 forwards", FEW_ROWS),
            Arm(
                "one-sided, 6 probes, low rank 1, 196 forwards",
                {**FEW_ROWS, "distribution": "low_rank_1"},
            ),
            Arm("one-sided, 16 probes, 510 forwards"),
        ),
        panels=BY_ROWS,
        seeds=5,
        has_memory=True,
        run={"distribution": "rademacher"},
        settings={"evaluate_every_rounds": 4},
        against={
            "one-sided, 6 probes, 196 forwards": "two-sided MeZO, 1000 forwards",
        },
        goals={
            "one-sided, 6 probes, 196 forwards: held-out accuracy, behind "
            "two-sided MeZO, 1000 forwards": "at most 0",
            "two-sided MeZO, 1000 forwards ÷ one-sided, 6 probes, 196 forwards: "
            "rows through the model": "at least 5",
        },
    ),
    "personalised": Experiment(
        "Personalised learning rates",
        tuple(Arm(name, values) for name, values in PERSONAL.items()),
        seeds=5,
        run={"schedule": "constant", "learning_rate": 1.5},
        settings={"evaluate_every_rounds": 5},
        paced_by="frozen",
    ),
    "distributions": Experiment(
        "Distribution of directions",
        tuple(
            Arm(name.replace("_", " "), {"distribution": name})
            for name in ("rademacher", "gaussian", "low_rank_1")
        ),
        seeds=5,
    ),
    "precision": Experiment(
        "Precision of the trained weights",
        (
            Arm("float32"),
            Arm("bfloat16, stochastic", {"dtype": "bfloat16", "rounding": "stochastic"}),
            Arm("bfloat16, nearest", {"dtype": "bfloat16", "rounding": "nearest"}),
        ),
        seeds=3,
        # The final norm has 576 weights of about 1.8, where half of bfloat16's last place is
        # 0.004 to 0.008. A commit's change of all 576 has a norm of 0.011 at first.
        run={
            "lora": None,
            "train": ["model.norm"],
            "distribution": "rademacher",
            "probes": 63,
            "rounds": 300,
            "learning_rate": 0.006,
            "eps": 0.03,
        },
        # A CPU without bfloat16 products takes a second per row.
        settings={"train_rows_max": 50, "heldout_rows_max": 300, "evaluate_every_rounds": 50},
    ),
    "local-steps": Experiment(
        "Local steps between two commits, at equal forwards",
        tuple(
            Arm(f"H = {steps}", {**CLASSIC, "local_steps": steps, "rounds": 300 // steps})
            for steps in (10, 30, 50)
        ),
        panels=BY_FORWARDS,
        settings={"evaluate_every_rounds": 2},
    ),
    "clients": Experiment(
        "Number of clients",
        (
            *(Arm(f"{n} clients", settings={"clients": n}) for n in (3, 4, 5, 9, 20, 40)),
            Arm(
                "40 clients, 20 answers a commit",
                {"buffer_answers": 20, "quorum": 20},
                {"clients": 40},
            ),
        ),
        panels=BY_FORWARDS,
        seeds=5,
        run={"batch_size": 8, "rate_directions": RATE_DIRECTIONS},
        settings={"evaluate_every_rounds": 1, "train_rows_max": 100},
        paced_by="4 clients",
        goals={
            "20 clients: rounds to the last held-out loss of 4 clients": "at most 10",
            "40 clients: rounds to the last held-out loss of 4 clients": "at most 6",
        },
    ),
    "topics": Experiment(
        "Eight topics of how-to guides, dealt by a Dirichlet draw",
        (
            Arm("FedMeZO", {"probes": 31, "rounds": 60, "learning_rate": 0.4, "lora": LAST_LORA}),
            Arm(
                "BP-FedAvg, LoRA",
                {**WHOLE, "lora": FIRST_ORDER_LORA, "local_steps": 5},
                first_order=FirstOrder(learning_rate=1e-3),
            ),
        ),
        panels=(("accuracy", "round"), ("loss", "round"), ("accuracy", "bytes"), ("loss", "bytes")),
        run={
            "task": {
                "template": "{text}. This is about",
                "label_column": "topic",
                "tokens_max": 32,
                "verbalizers": dict(TOPICS),
            },
        },
        settings={
            "data": str(CACHE / "data/topics"),
            "heldout_per_label": 0,
            "train_rows_max": None,
            "heldout_rows_max": None,
            "curve_rows": None,
            "evaluate_every_rounds": 20,
        },
        against={"FedMeZO": "BP-FedAvg, LoRA"},
        goals={
            "FedMeZO: held-out accuracy, behind BP-FedAvg, LoRA": "at most 0.03",
        },
    ),
    "questions": Experiment(
        "Questions that words of a sentence answer",
        (
            Arm("FedMeZO, by loss"),
            Arm("FedMeZO, by loss, rank 2", {"rounds": 20, "lora": SMALL_LORA}),
            Arm(
                "FedMeZO, by token F1, rank 2",
                {
                    "probes": 8,
                    "eps": 0.5,
                    "learning_rate": 2.0,
                    "lora": SMALL_LORA,
                    "task": {
                        **QUESTIONS,
                        "objective": "fedmezo_core.zo.objectives:one_minus_token_f1",
                        "generated_tokens_max": 5,
                    },
                },
                # New beginnings of texts are what takes time.
                {"train_rows_max": 16},
            ),
            Arm(
                "BP-FedAvg, LoRA",
                {
                    **WHOLE,
                    "lora": FIRST_ORDER_LORA,
                    "rounds": 3,
                    "local_steps": 5,
                    "batch_size": 8,
                },
                {"train_rows_max": None},
                first_order=FirstOrder(learning_rate=LORA_RATE),
            ),
        ),
        seeds=1,
        panels=(("exact_match", "round"), ("token_f1", "round"), ("loss", "round")),
        against={"FedMeZO, by loss": "BP-FedAvg, LoRA"},
        goals={"FedMeZO, by loss: exact match, behind BP-FedAvg, LoRA": "at most 0.05"},
        run={"task": QUESTIONS, "rounds": 16},
        settings={
            "data": str(CACHE / "data/questions"),
            "clients": 2,
            "train_rows_max": 64,
            "heldout_per_label": 0,
            "heldout_rows_max": 48,
            "evaluate_every_rounds": 100,
            "curve_rows": None,
            "generated_tokens_max": 5,
            # All probes' texts in one pass, so that few passes run over the head.
            "pass_tokens_max": 16384,
        },
    ),
    # `--set "attack=the clip's bound"` and the like try the other attacks.
    "byzantine": Experiment(
        "Two of ten workers attack in every round",
        BYZANTINE,
        panels=BY_FORWARDS,
        run={
            "rounds": 50,
            "probes": 28,
            "learning_rate": 0.5,
            "rate_directions": RATE_DIRECTIONS,
            "report_losses": True,
            # A ruined run is a result too.
            "pause_rounds": 0,
            "lora": LAST_LORA,
        },
        settings={
            "clients": 10,
            "attack": "ten times, sign turned",
            "attackers": 2,
            "train_rows_max": 160,
            "heldout_rows_max": None,
        },
        against={arm.name: "nobody attacks" for arm in BYZANTINE[1:]},
        goals={"default: held-out accuracy, behind nobody attacks": "at most 0.02"},
    ),
    "instructions": _instructions(
        "Instruction tuning: how-to texts of six categories", "hellaswag", ("category", "dirichlet")
    ),
    "instructions-alpaca": _instructions("Instruction tuning: Alpaca's kind", "alpaca", ()),
    "instructions-clients": _instruction_federations(),
}


@dataclass(frozen=True)
class Changes:
    """Values from the command line; they do not replace an arm's own values."""

    run: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    """Tiny sizes, only to see that everything runs."""


def run_of(experiment: Experiment, arm: Arm, seed: int, changes: Changes) -> Run:
    """Make the run of one arm and one seed; raises `ConfigError` for forbidden values."""
    run: dict[str, Any] = {**RUN, **experiment.run, **changes.run, **arm.run}
    settings = {**experiment.settings, **changes.settings, **arm.settings}
    if changes.quick:
        run |= {"rounds": 2, "local_steps": max(1, run["local_steps"] // 10), "batch_size": 2}
        few = min(1, settings.get("heldout_per_label", 1))
        settings |= {"heldout_per_label": few, "heldout_rows_max": 16, "curve_rows": 8}
    made = Settings.model_validate(settings)
    return Run(settings=made, config=config_of(made, seed, run), first_order=arm.first_order)
