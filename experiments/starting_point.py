"""The values that every experiment starts from: model, data, task, sizes, rates, rounds.

An arm of an experiment gives only the values in which it differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from experiments.attacks import Attack
from fedmezo_coordinator.programs.splits import Shares, split_category, split_dirichlet, split_iid
from fedmezo_core.config import RunConfig, TaskConfig, parse_run
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.data.rows import Example, read_rows
from fedmezo_core.zo.privacy.accounting import PrivacyBudget

CACHE = Path("build/cache")


def _fitted(rank: int, *modules: str) -> dict[str, Any]:
    """An adapter of which only B is trained, while A is fitted to texts (decision 0015)."""
    return {
        "rank": rank,
        "alpha": float(rank),
        "target_modules": list(modules),
        "freeze_a": True,
    }


LORA = _fitted(8, "layers.29.mlp.down_proj")
"""4,608 trained parameters at the end of the last of the model's 30 layers: few enough to learn in
some hundred forward passes, and cheap to measure."""

LAST_LORA = _fitted(32, "layers.29.mlp.up_proj")
"""49,152 parameters in the best module of the last layer: all that a CPU has time for."""

DEEP_LORA = _fitted(32, *(f"layers.{layer}.mlp.up_proj" for layer in range(20, 28)))
"""393,216 parameters in the layers whose inputs say most about the label; a probe costs 70 times as
much as with `LAST_LORA`."""

DEEP_CORE_LORA = {
    **_fitted(64, *(f"layers.{layer}.self_attn.v_proj" for layer in range(20, 28))),
    "output_rank": 8,
}
"""4,096 parameters in those layers: few enough for the directions that a CPU has time for."""

RUN: dict[str, Any] = {
    "model": "smollm2-135m",
    "rounds": 30,
    "local_steps": 1,
    "probes": 16,
    "estimator": "one_sided",
    "normalized_step": True,
    "batch_size": 16,
    "learning_rate": 3.0,
    # The experiments' rates were found for the directions of their own rounds.
    "rate_directions": 0,
    # It scales no answer of honest workers here, so that figures from before it was 1 stay.
    "clip_median_factor": 10.0,
    "clip_spread": 4.0,
    "clip_drop_factor": 0.0,
    "schedule": "linear",
    "eps": 1e-3,
    "distribution": "low_rank_1",
    "dtype": "float32",
    "lora": LORA,
    "digest_every_rounds": 10,
    "task": {
        "template": "{text} It was",
        "tokens_max": 64,
        "verbalizers": {"negative": " terrible", "positive": " great"},
    },
}
"""Values of `RunConfig`. A round waits for all clients unless an arm changes that."""

FIRST_ORDER_LORA: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "target_modules": ["q_proj", "v_proj"],
}
"""The adapter that back-propagation trains in the baseline: small, in all layers, as is usual."""

FULL_RATE = 2e-5
LORA_RATE = 3e-4
"""AdamW's learning rates in the first-order baseline."""


class Settings(BaseModel):
    """Everything that a result depends on apart from the run's contract."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = str(CACHE / "models/smollm2-135m")
    data: str = str(CACHE / "data/vader")
    clients: int = Field(default=4, ge=1)
    splitter: Literal["domains", "iid", "category", "dirichlet"] = "domains"
    """Which rows go to which client: whole domains in turn, or as `fedmezo split` deals them, with
    the domains as classes."""
    attack: Attack = "none"
    """What the attackers send."""
    attackers: int = Field(default=0, ge=0)
    """How many of the clients do so: the last ones by name."""
    alpha: float = Field(default=0.5, gt=0)
    """Of the Dirichlet splitter: smaller is more uneven."""
    train_rows_max: int | None = Field(default=400, ge=1)
    """Rows of each client; None: all it has. Frozen layers compute each row once for all runs."""
    heldout_per_label: int = Field(default=100, ge=0)
    """Rows of each label that each training file gives, in addition to heldout.jsonl: on VADER's
    four domains 400 + 4 x 2 x 100 = 1,200 rows, half of them of either label."""
    fit_rows: int = Field(default=100, ge=0)
    """Rows of each domain that no client has: an adapter with `freeze_a` is fitted to them, with
    their labels only if it has an `output_rank`. At most a tenth of what the domain has for
    training."""
    evaluate_every_rounds: int = Field(default=10, ge=1)
    heldout_rows_max: int | None = Field(default=600, ge=1)
    """Held-out rows that are used; None: all."""
    curve_rows: int | None = Field(default=300, ge=1)
    """Held-out rows behind each point of a curve; None: all. The first and last model are judged by
    all of them in any case."""
    generated_tokens_max: int = Field(default=0, ge=0)
    """Most tokens of the text that the model writes for each held-out row, which gives exact match
    and token F1; 0: it writes none."""
    evaluate_batch_size: int = Field(default=64, ge=1)
    privacy_epsilon: float | None = Field(default=None, gt=0)
    """What each client's rows may give away; None: there is no noise."""
    privacy_delta: float = Field(default=1e-5, gt=0)
    privacy_clip: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, ge=1)
    pass_tokens_max: int | None = Field(default=None, ge=1)
    """Largest number of tokens in a pass, as for `Estimator`; None: its default."""
    device: str = "cpu"

    def privacy_budget(self, ledgers: Path) -> PrivacyBudget | None:
        """What each client's rows may give away, with its ledger in the folder `ledgers`."""
        if self.privacy_epsilon is None:
            return None
        return PrivacyBudget(self.privacy_epsilon, self.privacy_delta, self.privacy_clip, ledgers)


def config_of(settings: Settings, seed: int, changes: Mapping[str, Any]) -> RunConfig:
    """Make the contract of one run: `RUN` with `changes`."""
    everyone = {"workers_min": settings.clients, "quorum": settings.clients}
    most = {"cohort_size_max": max(settings.clients, 64)}
    values = {"run_id": "experiment", "seed": seed, **RUN, **everyone, **most, **changes}
    return parse_run(values, "the experiment's run")


# ---------------------------------------------------------------- data


class Data(BaseModel):
    """Each client's rows, and the rows that the global model is judged by."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    clients: dict[str, list[Example]]
    heldout: list[Example]
    fitting: list[Example]
    """Rows that an adapter is fitted to; neither training nor judging uses them."""


def load_data(settings: Settings, task: TaskConfig) -> Data:
    """Read the folder's `<domain>.train.jsonl` and `heldout.jsonl` and deal the rows to clients.

    In addition to heldout.jsonl, the last `heldout_per_label` rows of each label in each training
    file are held out. The demo's files are in the order of a hash of their texts, so these are as
    fair a sample as any. Sentences of one Amazon review or editorial may be on both sides; that is
    the same for all methods. Held-out rows are put into the order of such a hash, too, so that the
    first of them are a fair sample.
    """
    folder = Path(settings.data)
    others = bool(task.objective)
    files = sorted(folder.glob("*.train.jsonl"))
    if not files:
        raise ConfigError(f"{folder} holds no <domain>.train.jsonl; run `make demo` or see docs.")
    heldout = read_rows(folder / "heldout.jsonl", task, keep_others=others)
    domains: dict[str, list[Example]] = {}
    fitting: list[Example] = []
    for file in files:
        rows = read_rows(file, task, keep_others=others)
        taken = _last_of_each(rows, task.answer_column, settings.heldout_per_label)
        heldout += [row for number, row in enumerate(rows) if number in taken]
        left = [row for number, row in enumerate(rows) if number not in taken]
        # The last ones, so that clients hold the same other rows with and without `fit_rows`.
        first_fitted = len(left) - min(settings.fit_rows, len(left) // 10)
        fitting += left[first_fitted:]
        domains[file.name.split(".")[0]] = left[:first_fitted]
    heldout.sort(key=_order_of)
    if settings.splitter == "domains":
        clients = split(domains, settings.clients)
    else:
        clients = _dealt(settings, domains)
    return Data(
        clients={name: rows[: settings.train_rows_max] for name, rows in clients.items()},
        heldout=heldout[: settings.heldout_rows_max],
        fitting=fitting,
    )


def _dealt(
    settings: Settings, domains: Mapping[str, Sequence[Example]]
) -> dict[str, list[Example]]:
    """Deal rows as `fedmezo split` does, each client's in the order of a hash."""
    pairs = [(name, row) for name in sorted(domains) for row in domains[name]]
    numbers, classes = range(len(pairs)), [name for name, _ in pairs]
    shares: Shares
    if settings.splitter == "iid":
        shares = split_iid(numbers, settings.clients, seed=1)
    elif settings.splitter == "category":
        shares = split_category(numbers, classes, settings.clients)
    else:
        least = min(settings.train_rows_max or 1, len(pairs) // (2 * settings.clients))
        shares = split_dirichlet(
            numbers, classes, settings.clients, alpha=settings.alpha, seed=1, rows_min=least
        )
    return {
        f"client-{number}": sorted((pairs[row][1] for row in share), key=_order_of)
        for number, share in enumerate(shares.rows, start=1)
    }


def _order_of(row: Example) -> bytes:
    return hashlib.sha256(repr(sorted(row.values.items())).encode()).digest()


def _last_of_each(rows: Sequence[Example], column: str, count: int) -> set[int]:
    """Indices of the last `count` rows with each value of `column`."""
    indices: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row.values[column], []).append(index)
    return {index for all_of in indices.values() for index in all_of[len(all_of) - count :]}


def split(domains: Mapping[str, Sequence[Example]], clients: int) -> dict[str, list[Example]]:
    """Deal whole domains to fewer clients, or the rows of a domain to several, in turns."""
    names = sorted(domains)
    if clients <= len(names):
        dealt = [names[first::clients] for first in range(clients)]
        return {"-".join(own): [row for name in own for row in domains[name]] for own in dealt}
    shares = {name: len(range(index, clients, len(names))) for index, name in enumerate(names)}
    return {
        f"{name}-{number + 1}" if count > 1 else name: list(domains[name][number::count])
        for name, count in shares.items()
        for number in range(count)
    }
