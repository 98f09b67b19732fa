"""Instruction tuning, FedMeZO beside federated averaging, judged by the loss of held-out answers.

The paper's central experiment (FedMeZO, KDD 2024), at a size that a CPU carries: an adapter on the
last layer, and rows of at most 64 tokens. `SAME` trains FedMeZO's own adapter with
back-propagation, so it shows how far that adapter can go. `ALL_LAYERS` trains the paper's kind of
adapter. `ZO_DEEP` and `SAME_DEEP` train few parameters in deep layers, where there is more to
learn; each probe then passes through the last third of the layers. `ZO_FEW` and `SAME_FEW` train
fewer still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from experiments.first_order import FirstOrder
from experiments.starting_point import DEEP_CORE_LORA, FIRST_ORDER_LORA, LORA

ZO: Final = "FedMeZO"
SAME: Final = "BP-FedAvg, the same adapter"
ALL_LAYERS: Final = "BP-FedAvg, LoRA in all layers"
ZO_DEEP: Final = "FedMeZO, deep layers"
SAME_DEEP: Final = "BP-FedAvg, the same in deep layers"
ZO_FEW: Final = "FedMeZO, 512 in deep layers"
SAME_FEW: Final = "BP-FedAvg, the same 512"

RUN: Final[dict[str, Any]] = {
    "rounds": 40,
    "probes": 8,
    "batch_size": 4,
    "learning_rate": 0.5,
    "lora": {**LORA, "rank": 4, "alpha": 4.0},
}
"""Values of `RunConfig` that all arms have; a round is one step of 4 rows, on 2,304 parameters."""
SETTINGS: Final[dict[str, Any]] = {
    "clients": 3,
    "splitter": "iid",
    "train_rows_max": 64,
    "heldout_per_label": 0,
    "heldout_rows_max": 64,
    "curve_rows": None,
    "fit_rows": 4,
    "evaluate_every_rounds": 10,
    "evaluate_batch_size": 16,
}
TASKS: Final[Mapping[str, dict[str, Any]]] = {
    "hellaswag": {
        "kind": "instruction",
        "template": "Text: {text}\nContinuation:\n",
        "response_column": "ending",
        "tokens_max": 64,
    },
    "alpaca": {
        "kind": "instruction",
        "template": "Instruction: {instruction}\nResponse:\n",
        "response_column": "answer",
        "tokens_max": 64,
    },
}
"""Data folder -> how its rows are read."""
SAME_RATE: Final = FirstOrder(learning_rate=1e-2)
ALL_LAYERS_RATE: Final = FirstOrder(learning_rate=1e-3)
ALL_LAYERS_RUN: Final[dict[str, Any]] = {"lora": FIRST_ORDER_LORA, "rounds": 12}
"""A step takes 1.3 s on a core."""
LOCAL_STEPS: Final[dict[str, Any]] = {"local_steps": 10, "rounds": 4}
DEEP_RUN: Final[dict[str, Any]] = {"lora": DEEP_CORE_LORA, "rounds": 100}
"""Back-propagation is at its best after about 100 rounds; then it fits the training rows alone."""
DEEP_ZO_RUN: Final[dict[str, Any]] = {
    **DEEP_RUN,
    "probes": 63,
    "learning_rate": 0.2,
    "distribution": "rademacher",
    # Only the base is in bfloat16, which a CPU with AMX multiplies six times as fast (0063).
    "dtype": "bfloat16",
    "eps": 0.05,
}
FEW_LORA: Final[dict[str, Any]] = {**DEEP_CORE_LORA, "rank": 16, "alpha": 16.0, "output_rank": 4}
"""512 parameters of the same layers, of which directions tell more (0064)."""
FEW_RUN: Final[dict[str, Any]] = {**DEEP_RUN, "lora": FEW_LORA}
FEW_ZO_RUN: Final[dict[str, Any]] = {**DEEP_ZO_RUN, "lora": FEW_LORA, "learning_rate": 0.4}
FEW_RATE: Final = FirstOrder(learning_rate=3e-2)
"""With 1e-2 they still learn after 100 rounds."""
DEEP_ZO_RUN_OF: Final[Mapping[str, dict[str, Any]]] = {
    "hellaswag": DEEP_ZO_RUN,
    "alpaca": {**DEEP_ZO_RUN, "rounds": 60, "learning_rate": 0.25},
}
"""Data folder -> FedMeZO's values in deep layers; Alpaca's kind levels off earlier."""
DEEP_SETTINGS: Final[dict[str, Any]] = {"fit_rows": 32}
"""4,096 parameters take more rows to fit their factors to than the last layer's 2,304."""
